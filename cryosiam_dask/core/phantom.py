"""Phantom tomograms with known ground truth, for the demo and for training its small models.

1. A lamella is a slab, slightly tilted against the grid, with noise only above and below it.
2. Structures are drawn as signed distances into a volume with a margin: vesicles and tubes (membranes), globular
   particles, worm-like filaments, microtubules. The lamella's faces cut them, as milling does.
3. The detector adds white noise, the limited tilt range takes a wedge out of the Fourier transform, and a slight blur
   stands for the denoising that CryoSiam expects before it.
4. Dense matter is bright, as CryoSiam's models expect it. Intensities are scaled to 0..1, so that the documented
   ``min: 0`` and ``max: 1`` fit.
5. The raw tomogram of the same specimen has more noise, the same wedge and no blur. Dense matter is dark, voxels are
   16-bit integers, and a few of them are hot or dead.

The margin is cut off at the end, because the Fourier transform treats the volume as periodic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import mrcfile
import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy import ndimage

CLASS_NAMES = ("background", "membrane", "particle", "filament", "microtubule")
MEMBRANE, PARTICLE, FILAMENT, MICROTUBULE = 1, 2, 3, 4

SHAPE = (80, 112, 112)
VOXEL_SIZE_ANGSTROM = 14.0

# Lengths in voxels of 14 Å: a lamella of 70 to 78 nm, bilayers of 7 nm, particles of 17 to 25 nm,
# filaments of 7 nm, microtubules of 25 nm.
_MARGIN = 16
_INSIDE = (slice(_MARGIN, -_MARGIN),) * 3
_THICKNESS = (50.0, 56.0)
_BILAYER = 2.4
_PARTICLE_RADII = (6.0, 9.0)
_FILAMENT = 2.4
_MICROTUBULE, _MICROTUBULE_WALL = 9.0, 3.0
_TILT_RANGE_DEGREES = 60.0

Distances = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Phantom:
    """A simulated tomogram and its ground truth.

    Attributes
    ----------
    tomogram
        (z, y, x), float32, 0..1; dense matter is bright.
    truth
        (z, y, x), uint8, indices into `CLASS_NAMES`; 0 outside the lamella.
    lamella
        (z, y, x), uint8, 1 inside the lamella.
    specimen
        (z, y, x) with a margin, float32: the density that the microscope sees.
    voxel_size_angstrom
        Edge of a voxel in Å.
    """

    tomogram: NDArray[np.float32]
    truth: NDArray[np.uint8]
    lamella: NDArray[np.uint8]
    specimen: NDArray[np.float32]
    voxel_size_angstrom: float = VOXEL_SIZE_ANGSTROM


def make_phantom(seed: int, shape: tuple[int, int, int] = SHAPE) -> Phantom:
    """Simulate a tomogram of a tilted lamella; the same seed and shape give the same phantom.

    Parameters
    ----------
    seed
        Seed of the random numbers.
    shape
        (z, y, x) in voxels; z should exceed the lamella's 56 voxels.
    """
    rng = np.random.default_rng(seed)
    canvas = _Canvas(tuple(s + 2 * _MARGIN for s in shape), rng)
    lamella = _slab(canvas)
    # Large structures first, while there is room for them. The counts are proportional to the lamella's area.
    area = shape[1] * shape[2] / (112 * 112)
    for draw, count in ((_draw_microtubule, 1.5), (_draw_vesicle, 3), (_draw_tube, 2)):
        for _ in range(round(count * area)):
            draw(canvas)
    _draw_filaments(canvas, round(50 * area))
    _draw_particles(canvas, round(60 * area))
    specimen = _specimen(canvas, lamella)
    noise = canvas.rng.normal(0, 0.3, specimen.shape).astype(np.float32)
    truth = np.where(lamella, canvas.labels, np.uint8(0))
    return Phantom(
        tomogram=_scale(_image(specimen + noise, blur=1.0)[_INSIDE]),
        truth=np.ascontiguousarray(truth[_INSIDE]),
        lamella=lamella[_INSIDE].astype(np.uint8),
        specimen=specimen,
    )


#: Standard deviation of the noise of a raw phantom, in units of density, and the share of its hot and dead voxels.
NOISE, HOT = 0.6, 2e-5


def make_raw(phantom: Phantom, seed: int) -> NDArray[np.int16]:
    """Simulate the raw reconstruction of a phantom's specimen, before denoising.

    Parameters
    ----------
    phantom
        The phantom.
    seed
        Seed of the noise.

    Returns
    -------
    (z, y, x), int16
        Dark on bright.
    """
    rng = np.random.default_rng((seed, 1))
    noise = rng.normal(0, NOISE, phantom.specimen.shape).astype(np.float32)
    voxels = np.round(300 - 1000 * _image(phantom.specimen + noise)[_INSIDE])
    wrong = rng.random(voxels.shape) < HOT
    voxels[wrong] = rng.choice([-30000, 30000], int(wrong.sum()))
    return voxels.astype(np.int16)


def write_phantom(phantom: Phantom, folder: Path, stem: str, seed: int) -> Path:
    """Write ``<stem>.mrc`` (the raw tomogram, with its voxel size) and ``<stem>_truth.npz`` (`labels`, `lamella`).

    Parameters
    ----------
    phantom, folder, stem
        What to write, and where.
    seed
        Seed of the noise, see `make_raw`.

    Returns
    -------
    Path
        The tomogram.
    """
    path = folder / f"{stem}.mrc"
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(make_raw(phantom, seed))
        mrc.set_volume()
        mrc.voxel_size = phantom.voxel_size_angstrom
    np.savez_compressed(folder / f"{stem}_truth.npz", labels=phantom.truth, lamella=phantom.lamella)
    return path


def dice(prediction: NDArray[np.uint8], truth: NDArray[np.uint8], n_classes: int) -> tuple[float, ...]:
    """Return each class's Dice score, 2 |A ∩ B| / (|A| + |B|), in the order of the labels; 1 if both lack the class."""
    agreed = np.bincount(truth[prediction == truth], minlength=n_classes)
    total = np.bincount(prediction.ravel(), minlength=n_classes) + np.bincount(truth.ravel(), minlength=n_classes)
    return tuple(2 * int(a) / int(t) if t else 1.0 for a, t in zip(agreed, total, strict=True))


class _Canvas:
    """The volume that is drawn into, margin included: density (0..1) and labels."""

    def __init__(self, shape: tuple[int, ...], rng: np.random.Generator) -> None:
        self.rng = rng
        self.shape = shape
        self.density = np.zeros(shape, np.float32)
        self.labels = np.zeros(shape, np.uint8)

    def box(self, low: NDArray[np.floating], high: NDArray[np.floating]) -> tuple[slice, ...]:
        """Return the region between two corners."""
        return tuple(
            slice(max(0, math.floor(a)), min(s, math.ceil(b) + 1))
            for a, b, s in zip(low, high, self.shape, strict=True)
        )

    def point(self, depth: float) -> NDArray[np.float64]:
        """Return a random point (z, y, x) whose z is at most `depth` from the middle."""
        point = self.rng.uniform(0, self.shape)
        point[0] = self.shape[0] / 2 + self.rng.uniform(-depth, depth)
        return point

    def is_free(self, box: tuple[slice, ...], distance: Distances, clearance: float) -> bool:
        """Whether nothing was drawn yet within `clearance` of where `distance` is negative."""
        return not self.labels[box][distance < clearance].any()

    def draw(self, box: tuple[slice, ...], distance: Distances, label: int, density: Distances | float) -> None:
        """Draw the voxels whose distance is negative, with an edge one voxel wide."""
        edge = np.clip(0.5 - distance, 0, 1) * density
        np.maximum(self.density[box], edge, out=self.density[box])
        self.labels[box][distance < 0] = label


def _coordinates(box: tuple[slice, ...], origin: NDArray[np.float64]) -> list[Distances]:
    """Return coordinates of a box's voxels relative to a point to broadcast: z (d, 1, 1), y (1, h, 1), x (1, 1, w)."""
    axes = (np.arange(part.start, part.stop) - at for part, at in zip(box, origin, strict=True))
    return [a.astype(np.float32) for a in np.meshgrid(*axes, indexing="ij", sparse=True)]


def _slab(canvas: _Canvas) -> NDArray[np.bool_]:
    """Return the lamella: a slab through the middle that slopes a few degrees along y and x."""
    z, y, x = _coordinates(tuple(slice(0, s) for s in canvas.shape), np.array(canvas.shape) / 2)
    slope_y, slope_x = canvas.rng.uniform(0.02, 0.05, 2) * canvas.rng.choice([-1, 1], 2)
    return np.asarray(np.abs(z - slope_y * y - slope_x * x) < canvas.rng.uniform(*_THICKNESS) / 2)


def _direction(canvas: _Canvas, rise: float) -> NDArray[np.float64]:
    """Return a random unit vector (z, y, x) in the plane of the lamella, except for a z of up to `rise`."""
    angle = canvas.rng.uniform(0, 2 * np.pi)
    vector = np.array([canvas.rng.uniform(-rise, rise), np.sin(angle), np.cos(angle)])
    return np.asarray(vector / np.linalg.norm(vector))


def _draw_vesicle(canvas: _Canvas) -> None:
    """Draw an ellipsoidal bilayer near the middle of the lamella, so that its faces cut the larger ones open."""
    for _ in range(40):
        radius = canvas.rng.uniform(16, 32)
        centre = canvas.point(8)
        stretch = canvas.rng.uniform(0.85, 1.15, 3)
        box = canvas.box(centre - 1.2 * radius - 4, centre + 1.2 * radius + 4)
        z, y, x = (c / s for c, s in zip(_coordinates(box, centre), stretch, strict=True))
        shell = np.abs(np.sqrt(z * z + y * y + x * x) - radius) - _BILAYER
        if canvas.is_free(box, shell, 4):
            canvas.draw(box, shell, MEMBRANE, 0.75)
            return


def _draw_tube(canvas: _Canvas) -> None:
    """Draw a membrane tube with round ends."""
    for _ in range(40):
        start, radius = canvas.point(14), canvas.rng.uniform(10, 13)
        end = start + _direction(canvas, 0.4) * canvas.rng.uniform(25, 60)
        box = canvas.box(np.minimum(start, end) - radius - 5, np.maximum(start, end) + radius + 5)
        shell = np.abs(_distance_to_segment(box, start, end) - radius) - _BILAYER
        if canvas.is_free(box, shell, 4):
            canvas.draw(box, shell, MEMBRANE, 0.75)
            return


def _draw_microtubule(canvas: _Canvas) -> None:
    """Draw a straight hollow cylinder across the whole field; its lumen belongs to it."""
    for _ in range(40):
        centre, along = canvas.point(14), _direction(canvas, 0.1) * sum(canvas.shape)
        box = tuple(slice(0, s) for s in canvas.shape)
        distance = _distance_to_segment(box, centre - along, centre + along) - _MICROTUBULE
        if canvas.is_free(box, distance, 3):
            canvas.draw(box, distance, MICROTUBULE, np.where(distance > -_MICROTUBULE_WALL, np.float32(0.85), 0))
            return


def _distance_to_segment(box: tuple[slice, ...], start: NDArray[np.float64], end: NDArray[np.float64]) -> Distances:
    """Distance of each voxel from a line between two points."""
    z, y, x = _coordinates(box, start)
    along = (end - start).astype(np.float32)
    nearest = np.clip((z * along[0] + y * along[1] + x * along[2]) / (along @ along), 0, 1)
    offsets = (c - nearest * a for c, a in zip((z, y, x), along, strict=True))
    return np.asarray(np.sqrt(sum(o * o for o in offsets)))


def _draw_filaments(canvas: _Canvas, count: int) -> None:
    """Draw worm-like chains: steps of one voxel whose direction drifts; a chain ends where it meets something."""
    axis = np.zeros(canvas.shape, bool)
    blocked = ndimage.binary_dilation(canvas.labels > 0, iterations=5)
    for _ in range(count):
        point, direction = canvas.point(26), _direction(canvas, 0.5)
        for _ in range(int(canvas.rng.integers(40, 120))):
            direction += canvas.rng.normal(0, 0.12, 3)
            direction /= np.linalg.norm(direction)
            point += direction
            index = tuple(point.astype(int))
            if point.min() < 0 or np.any(point >= canvas.shape) or blocked[index]:
                break
            axis[index] = True
    distance = ndimage.distance_transform_edt(~axis).astype(np.float32) - _FILAMENT
    canvas.draw(tuple(slice(0, s) for s in canvas.shape), distance, FILAMENT, 0.9)


def _draw_particles(canvas: _Canvas, count: int) -> None:
    """Draw globular complexes with a lumpy surface and a little structure inside."""
    for _ in range(count):
        for _ in range(20):
            centre, radius = canvas.point(28), canvas.rng.uniform(*_PARTICLE_RADII)
            box = canvas.box(centre - radius - 4, centre + radius + 4)
            z, y, x = _coordinates(box, centre)
            phase = canvas.rng.uniform(0, 2 * np.pi, 3).astype(np.float32)
            lumps = sum(np.sin(0.6 * c + p) for c, p in zip((z, y, x), phase, strict=True))
            distance = (np.sqrt(z * z + y * y + x * x) - radius + 0.4 * lumps).astype(np.float32)
            if canvas.is_free(box, distance, 3):
                canvas.draw(box, distance, PARTICLE, (0.95 + 0.1 * lumps / 3).astype(np.float32))
                break


def _specimen(canvas: _Canvas, lamella: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the density: structures in a textured cytosol, and nothing outside the lamella."""
    cytosol = ndimage.gaussian_filter(canvas.rng.standard_normal(canvas.shape, np.float32), 1.2)
    cytosol *= 0.2 / cytosol.std()
    return np.where(lamella, canvas.density + 0.25 + cytosol * (1 - canvas.density), np.float32(0))


def _image(density: NDArray[np.float32], blur: float = 0) -> NDArray[np.float32]:
    """Take out the missing wedge of a limited tilt range, and blur by a Gaussian whose sigma is `blur` voxels."""
    spectrum = scipy.fft.rfftn(density)
    kz, ky, kx = (
        scipy.fft.fftfreq(density.shape[0])[:, None, None].astype(np.float32),
        scipy.fft.fftfreq(density.shape[1])[None, :, None].astype(np.float32),
        scipy.fft.rfftfreq(density.shape[2])[None, None, :].astype(np.float32),
    )
    # The specimen turns about y, so each projection fills a plane through the ky axis.
    missing = np.abs(kz) > np.abs(kx) * np.tan(np.deg2rad(_TILT_RANGE_DEGREES))
    passed = np.exp(-2 * (np.pi * blur) ** 2 * (kz**2 + ky**2 + kx**2))
    return np.asarray(scipy.fft.irfftn(np.where(missing, 0, spectrum * passed), density.shape))


def _scale(density: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale to mean 0.4 and standard deviation 0.15, bright where dense, and clip to 0..1."""
    return np.asarray(np.clip(0.4 + 0.15 * (density - density.mean()) / density.std(), 0, 1), np.float32)
