"""Everything that can stand in the way of a run, reported before any work starts."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import mrcfile
import numpy as np
import pytest
import yaml
from rich.console import Console

from cryosiam_dask.commands.info import inspect
from cryosiam_dask.commands.status import print_overview
from cryosiam_dask.config import Configuration, read_configuration
from cryosiam_dask.errors import ConfigurationError, CryosiamDaskError, Problems, TomogramError
from cryosiam_dask.files.folders import left_out
from cryosiam_dask.files.identity import source_identity
from cryosiam_dask.runs.find import find_predictions, find_tomograms
from cryosiam_dask.runs.fingerprint import removal_sizes, settings_of, with_sizes
from cryosiam_dask.runs.plan import RunPlan, plan_run
from support import checkpoints


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two small tomograms, a checkpoint and a folder of masks."""
    for name in ("data", "masks"):
        (tmp_path / name).mkdir()
    for stem in ("TS_1", "TS_018_9.96Apx"):
        with mrcfile.new(tmp_path / "data" / f"{stem}.mrc") as mrc:
            mrc.set_data(np.zeros((4, 5, 6), np.float32))
        (tmp_path / "masks" / f"{stem}_preds.h5").touch()
    checkpoints.write(tmp_path / "model.ckpt", checkpoints.SMALL)
    return tmp_path


def configure(folder: Path, **changes: Any) -> Configuration:
    """A configuration; keys of sections are written with double underscores."""
    values: dict[str, Any] = {
        "data_folder": str(folder / "data"),
        "prediction_folder": str(folder / "out"),
        "trained_model": str(folder / "model.ckpt"),
    }
    for key, value in changes.items():
        *sections, last = key.split("__")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return read_configuration(folder / "config.yaml")


def problems(configuration: Configuration, **options: Any) -> list[str]:
    with pytest.raises(Problems) as caught:
        plan_run(configuration, **options)
    return [str(problem) for problem in caught.value.problems]


def test_jobs_and_defaults(folder: Path) -> None:
    plan = plan_run(configure(folder, mask_folder=str(folder / "masks")))
    assert [job.stem for job in plan.jobs] == ["TS_018_9.96Apx", "TS_1"]
    assert plan.jobs[0].output == folder / "out" / "TS_018_9.96Apx_preds.h5"
    assert plan.jobs[0].mask == folder / "masks" / "TS_018_9.96Apx_preds.h5"
    assert plan.patch == (16, 16, 16) and plan.threshold == 0.1 and plan.labels == 3
    assert plan.wanted == ("labels",)
    assert not (folder / "out").exists()  # nothing is written


def test_patch_size_and_threshold_of_the_configuration_rule(folder: Path) -> None:
    patch = {"parameters__data__patch_size": [8, 16, 24], "parameters__network__threshold": 0.5}
    plan = plan_run(configure(folder, **patch))
    assert plan.patch == (8, 16, 24) and plan.threshold == 0.5
    assert plan.spec("cpu").patch == (8, 16, 24) and plan.spec("cpu").threshold == 0.5


def test_outputs_follow_what_is_saved(folder: Path) -> None:
    assert plan_run(configure(folder, parameters__network__postprocessing=True)).wanted == ("labels", "probabilities")
    plan = plan_run(configure(folder, save_internal_files=True, save_original_file_extension=True))
    assert plan.wanted == ("labels", "probabilities", "distances")
    assert plan.jobs[0].output.name == "TS_018_9.96Apx_preds.h5"
    plan = plan_run(configure(folder, save_original_file_extension=True))
    assert plan.jobs[0].output == folder / "out" / "TS_018_9.96Apx.mrc"


def test_names_of_single_tomograms(folder: Path) -> None:
    assert [j.stem for j in plan_run(configure(folder, test_files=["TS_1.mrc"])).jobs] == ["TS_1"]
    assert [j.stem for j in plan_run(configure(folder, test_files=["TS_018_9.96Apx"])).jobs] == ["TS_018_9.96Apx"]
    assert [j.stem for j in plan_run(configure(folder), filename="TS_1.mrc").jobs] == ["TS_1"]


def test_folder_whose_name_contains_the_extension(folder: Path) -> None:
    (folder / "data").rename(folder / "x.mrc.d")
    plan = plan_run(configure(folder, data_folder=str(folder / "x.mrc.d")))
    assert [job.output.name for job in plan.jobs] == ["TS_018_9.96Apx_preds.h5", "TS_1_preds.h5"]


def test_keys_without_effect_and_labels_without_size_are_noted(folder: Path) -> None:
    plan = plan_run(configure(folder, log_dir="x", parameters__network__postprocessing_sizes=[-1, 5]))
    assert plan.notes == (
        "the key log_dir has no effect here",
        "postprocessing_sizes has 2 entries for the 3 labels 0 to 2: labels from 2 on are not filtered",
    )


FAULTS: dict[str, tuple[dict[str, Any], Callable[[Path], object], str]] = {
    "no data folder": ({"data_folder": "nowhere"}, lambda f: None,
        r"key data_folder: does not exist: nowhere \(relative to /.*\)\. Correct data_folder"),
    "data folder is a file": ({"data_folder": "model.ckpt"}, lambda f: None, "key data_folder: must be a folder"),
    "empty data folder": ({}, lambda f: [p.unlink() for p in (f / "data").iterdir()],
        "key data_folder.*at least one file whose name ends with file_extension, which is .mrc; found no file at all"),
    "other files only": ({"file_extension": ".rec"}, lambda f: None, r"found files ending with \.mrc\. Check"),
    "no checkpoint": ({"trained_model": "nowhere.ckpt"}, lambda f: None, "nowhere.ckpt"),
    "no mask folder": ({"mask_folder": "nowhere"}, lambda f: None, "mask_folder: does not exist.*Run the lamella"),
    "a mask is missing": ({"mask_folder": "masks"}, lambda f: [p.unlink() for p in (f / "masks").iterdir()],
        r"key mask_folder: there must be a lamella mask for TS_.*; found no file .*_preds.h5\. Run the lamella"),
    "prediction folder is a file": ({"prediction_folder": "model.ckpt"}, lambda f: None,
        r"key prediction_folder: must be a folder that can be written or created.*is a file\)"),
    "prediction folder below a file": ({"prediction_folder": "model.ckpt/out"}, lambda f: None,
        "key prediction_folder: must be a folder"),
    "prediction folder below a lost disk": ({"prediction_folder": "gone/out"},
        lambda f: (f / "gone").symlink_to(f / "disk"), r"gone is a broken link\).*mount the disk"),
    "work folder is a file": ({"work_folder": "model.ckpt"}, lambda f: None, "key work_folder: must be a folder"),
    "missing test file": ({"test_files": ["TS_9.mrc"]}, lambda f: None,
        r"key test_files: the tomogram must be a file in data_folder.*found TS_9.mrc"),
    "test file of another extension": ({"test_files": ["TS_1.rec"]}, lambda f: None,
        r"must end with file_extension, which is .mrc; found TS_1.rec"),
    "no test file": ({"test_files": []}, lambda f: None, "key test_files: must name at least one tomogram"),
    "other dimensions": ({"parameters__network__spatial_dims": 2}, lambda f: None,
        r"key parameters.network.spatial_dims: must agree with the checkpoint .*which has 3; found 2\. Set it to 3"),
    "other channels": ({"parameters__network__in_channels": 2}, lambda f: None, r"in_channels: must agree.*found 2"),
    "patch of two axes": ({"parameters__data__patch_size": [16, 16]}, lambda f: None,
        r"key parameters.data.patch_size: must be 3 multiples of 8.*found \[16, 16\]\. Set it to \[16, 16, 16\]"),
    "halo too small": ({"parameters__data__halo": 10, "parameters__data__patch_size": [32, 32, 32]}, lambda f: None,
        r"parameters.data.halo: must be at least 11, the halo that this network needs.*less than half of patch_size "
        r"\[32, 32, 32\]; found 10\. Set it to 11"),
    "halo of half a patch": ({"parameters__data__halo": 16, "parameters__data__patch_size": [64, 32, 32]},
        lambda f: None, r"key parameters.data.halo: .*found 16\. Set it to 11"),
    "patch too small for any halo": ({"parameters__data__halo": 4}, lambda f: None,
        r"key parameters.data.halo: must be at least 11.*\[16, 16, 16\]; found 4\. Set patch_size to 24 or more"),
    "patch of odd size": ({"parameters__data__patch_size": [16, 17, 6]}, lambda f: None,
        r"multiples of 8.*found \[16, 17, 6\]\. Set it to \[16, 16, 8\]"),
    "size for a label that does not exist": ({"parameters__network__postprocessing_sizes": [-1, 1, 1, 1]},
        lambda f: None, r"postprocessing_sizes: must have one entry for each of the model's 3 labels"),
    "output made by another program": ({}, lambda f: ((f / "out").mkdir(), (f / "out/TS_1_preds.h5").touch()),
        r"TS_1_preds.h5: this output was made from another input.*Replace it with --overwrite"),
    "output over its mask": ({"prediction_folder": "masks", "mask_folder": "masks"}, lambda f: None,
        "an output must not replace its own input"),
    "output over its input": ({"prediction_folder": "data", "save_original_file_extension": True}, lambda f: None,
        "an output must not replace its own input"),
}  # fmt: skip


def test_a_folder_without_masks_is_told_once(folder: Path) -> None:
    (folder / "empty").mkdir()
    for number in range(5):
        shutil.copy(folder / "data" / "TS_1.mrc", folder / "data" / f"TS_1{number}.mrc")
    (problem,) = problems(configure(folder, mask_folder=str(folder / "empty")))
    assert re.search(
        r"/empty: must hold a lamella mask for each tomogram; found none of \d, such as TS_.*Run the lamella", problem
    )


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_reported_with_its_remedy(folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes, prepare, expected = FAULTS[fault]
    monkeypatch.chdir(folder)
    prepare(folder)
    before = sorted(folder.rglob("*"))
    found = problems(configure(folder, **changes))
    assert all(re.search(expected, problem, re.S) for problem in found), found
    assert sorted(p for p in folder.rglob("*") if p.name != "config.yaml") == before  # nothing was made


def test_two_tomograms_with_one_output_are_refused_and_one_named_twice_is_done_once(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / "data" / name).mkdir()
        shutil.copy(folder / "data" / "TS_1.mrc", folder / "data" / name)
    (problem,) = problems(configure(folder, test_files=["a/TS_1.mrc", "b/TS_1.mrc"]))
    assert "two tomograms must not have the same output" in problem and "b/TS_1.mrc" in problem
    assert len(plan_run(configure(folder, test_files=["TS_1.mrc", "TS_1", "TS_1.mrc"])).jobs) == 1


def test_lamella_of_an_image_is_refused(folder: Path) -> None:
    from dataclasses import replace

    images = replace(checkpoints.SMALL, spatial_dims=2, kernel_size=(3, 3))
    checkpoints.write(folder / "model.ckpt", images)
    network = {"parameters__network__spatial_dims": 2, "parameters__network__postprocessing": True}
    (problem,) = problems(configure(folder, **network))
    assert "postprocessing: lamella post-processing needs a model for 3-D tomograms" in problem


def test_what_cannot_be_looked_into_is_named(folder: Path) -> None:
    """A loop of links refuses even the superuser."""
    (folder / "data" / "loop.mrc").symlink_to(folder / "data" / "loop.mrc")
    plan_run(configure(folder))  # among others it is no file
    (folder / "loop").symlink_to(folder / "loop")
    with pytest.raises(CryosiamDaskError, match="loop"):
        plan_run(configure(folder, data_folder=str(folder / "loop")))


def test_all_faults_are_reported_at_once(folder: Path) -> None:
    (folder / "masks" / "TS_1_preds.h5").unlink()
    (folder / "masks" / "TS_018_9.96Apx_preds.h5").unlink()
    found = problems(
        configure(
            folder, mask_folder=str(folder / "masks"), work_folder=str(folder / "model.ckpt"),
            parameters__network__spatial_dims=2, parameters__data__patch_size=[15, 16, 16],
        )
    )  # fmt: skip
    assert len(found) == 5


def test_a_single_tomogram_needs_only_its_own_mask(folder: Path) -> None:
    (folder / "masks" / "TS_1_preds.h5").unlink()
    configuration = configure(folder, mask_folder=str(folder / "masks"))
    assert len(plan_run(configuration, filename="TS_018_9.96Apx.mrc").jobs) == 1
    assert len(problems(configuration, filename="TS_1.mrc")) == 1
    assert "--filename" in problems(configuration, filename="TS_9.mrc")[0]


def test_overwrite_allows_foreign_outputs(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "TS_1_preds.h5").touch()
    assert len(plan_run(configure(folder), overwrite=True).jobs) == 2


def test_bifpn_needs_multiples_of_16(folder: Path) -> None:
    from dataclasses import replace

    checkpoints.write(folder / "model.ckpt", replace(checkpoints.SMALL, decoder="bifpn", bifpn_layers=1))
    (problem,) = problems(configure(folder, parameters__data__patch_size=[24, 24, 24]))
    assert "multiples of 16" in problem and "[16, 16, 16]" in problem


def test_model_without_distances_saves_probabilities_alone(folder: Path) -> None:
    from dataclasses import replace

    checkpoints.write(folder / "model.ckpt", replace(checkpoints.SMALL, distance_widths=None))
    plan = plan_run(configure(folder, save_internal_files=True))
    assert plan.wanted == ("labels", "probabilities")
    assert "no distance head" in plan.notes[0]


def test_fingerprint_changes_with_everything_that_changes_numbers(folder: Path) -> None:
    def fingerprint(**changes: Any) -> str:
        return next(j.fingerprint for j in plan_run(configure(folder, **changes)).jobs if j.stem == "TS_1")

    seen = [
        fingerprint(),
        fingerprint(parameters__data__max=2),
        fingerprint(parameters__data__invert=True),
        fingerprint(parameters__data__patch_size=[8, 16, 16]),
        fingerprint(parameters__data__patch_size=[32, 32, 32]),
        fingerprint(parameters__data__patch_size=[32, 32, 32], parameters__data__halo=12),
        fingerprint(hyper_parameters__precision="bf16"),
        fingerprint(parameters__network__threshold=0.2),
        fingerprint(parameters__network__postprocessing=True),
        fingerprint(parameters__network__postprocessing=True, parameters__network__3d_postprocessing=True),
        fingerprint(parameters__network__postprocessing_sizes=[-1, 5, -1]),
        fingerprint(save_internal_files=True),
        fingerprint(mask_folder=str(folder / "masks")),
    ]
    shutil.copy(folder / "data" / "TS_018_9.96Apx.mrc", folder / "data" / "TS_1.mrc")  # another time of modification
    seen.append(fingerprint())
    checkpoints.write(folder / "model.ckpt", checkpoints.SMALL, lambda values: values.update(epoch=99))
    seen.append(fingerprint())
    assert len(set(seen)) == len(seen)
    same = fingerprint(block_size=64, keep_work=True, hyper_parameters__batch_size=1)
    assert same == seen[-1] == fingerprint(parameters__network__postprocessing_sizes=[-1, -1, -1])


def test_components_that_are_missing_or_of_other_labels_are_made(folder: Path) -> None:
    (folder / "out").mkdir()
    configuration = configure(folder, components=True, preview=False)
    assert [job.components for job in plan_run(configure(folder)).jobs] == [None, None]
    for job in plan_run(configuration).jobs:
        with h5py.File(job.output, "w") as file:
            file.attrs["fingerprint"] = job.fingerprint
    job = next(j for j in plan_run(configuration).incomplete if j.stem == "TS_018_9.96Apx")
    assert job.components == folder / "out" / "TS_018_9.96Apx_components.h5"
    for ending in (".csv", ".parquet"):
        (folder / "out" / f"TS_018_9.96Apx_components{ending}").touch()
    for fingerprint, done in ((None, False), ("other", False), (job.fingerprint, True)):
        with h5py.File(job.components, "w") as file:
            file.attrs.update({"fingerprint": fingerprint} if fingerprint else {})
        plan = plan_run(configuration)
        assert not plan.jobs
        assert [j.stem for j in plan.skipped] == ["TS_018_9.96Apx"] * done
        assert [j.stem for j in plan.incomplete] == ["TS_018_9.96Apx"] * (not done) + ["TS_1"]
    (folder / "out" / "TS_018_9.96Apx_components.parquet").unlink()
    assert len(plan_run(configuration).incomplete) == 2
    assert len(plan_run(configure(folder, preview=False)).skipped) == 2


def test_sizes_without_effect_are_left_out(folder: Path) -> None:
    assert removal_sizes(configure(folder, parameters__network__postprocessing_sizes=[-1, 5, -1])) == [-1, 5]
    assert with_sizes("x", [-1, 5]) != with_sizes("x", [])


def test_memory_of_a_worker_grows_with_what_it_holds(folder: Path) -> None:
    small = plan_run(configure(folder, block_size=24)).bytes_per_worker
    assert small < plan_run(configure(folder, block_size=256)).bytes_per_worker
    assert small < plan_run(configure(folder, block_size=24, save_internal_files=True)).bytes_per_worker


def many_classes(folder: Path, **changes: Any) -> RunPlan:
    """A plan for particles of 89 kinds in tomograms of 26 voxels along each axis."""
    checkpoints.write(folder / "model.ckpt", replace(checkpoints.SMALL, out_channels=89))
    for path in (folder / "data").iterdir():
        with mrcfile.new(path, overwrite=True) as mrc:
            mrc.set_data(np.zeros((26, 26, 26), np.float32))
    return plan_run(configure(folder, save_internal_files=True, **changes)).with_shapes()


def test_blocks_are_bounded_by_the_tomogram(folder: Path) -> None:
    plan = many_classes(folder)
    plan.require_memory(2 * 10**9)
    assert plan.bytes_per_worker < 10**9


def test_blocks_are_the_largest_that_fit_into_the_memory(folder: Path) -> None:
    plan = many_classes(folder)
    fixed = plan.bytes_per_worker - plan.block_bytes
    sizes = []
    for megabytes in (4000, 400, 40, 10):
        fitted = plan.with_memory(fixed + megabytes * 10**6)
        sizes.append(fitted.block_size((200, 200, 200)))
        large = replace(fitted, shapes=((200, 200, 200),))
        assert large.block_bytes <= megabytes * 10**6 or sizes[-1] == 24
        assert (
            sizes[-1] == 320
            or replace(
                large, configuration=plan.configuration.model_copy(update={"block_size": sizes[-1] + 16})
            ).block_bytes
            > megabytes * 10**6
        )
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4
    # On a GPU the smaller of both memories counts.
    of_gpu = plan.with_memory(10**12, 60 * 10**6)
    assert 0 < (of_gpu.room or 0) < 60 * 10**6 and of_gpu.block_size((200, 200, 200)) < 100
    assert plan.with_memory(fixed, 10**12).room is not None


def test_what_does_not_fit_is_refused_with_what_does(folder: Path) -> None:
    plan = replace(many_classes(folder, block_size=128), shapes=((200, 200, 200),))
    host = plan.bytes_per_worker - plan.block_bytes + 10**8
    with pytest.raises(
        ConfigurationError, match=r"memory of a worker; found about .* GB for patch_size .* and block_size 128"
    ) as caught:
        plan.require_memory(host)
    own = int(re.search(r"Set block_size to (\d+)", str(caught.value))[1])  # type: ignore[index]
    for size, fits in ((own, True), (None, True), (own + 16, False)):
        changed = replace(plan, configuration=plan.configuration.model_copy(update={"block_size": size}))
        with nullcontext() if fits else pytest.raises(ConfigurationError):
            changed.require_memory(host)
    with pytest.raises(ConfigurationError, match="of a worker's GPU"):
        plan.require_memory(10**12, 10**8)
    # Not even the smallest blocks fit: then it is the patch.
    small = plan.bytes_per_worker - plan.block_bytes + 4 * 10**6
    with pytest.raises(ConfigurationError, match=r"Set patch_size to \[8, 8, 8\], and block_size to null") as caught:
        plan.require_memory(small)
    changed = many_classes(folder, parameters__data__patch_size=[8, 8, 8])
    replace(changed, shapes=plan.shapes).require_memory(small)


def test_what_is_of_one_tomogram_stands_in_its_way_alone(folder: Path) -> None:
    def jobs() -> dict[str, str]:
        plan = plan_run(configure(folder, mask_folder=str(folder / "masks"))).with_shapes()
        return {job.stem: str(job.problem or "") for job in plan.jobs}

    mask = folder / "masks" / "TS_1_preds.h5"
    with h5py.File(folder / "masks" / "TS_018_9.96Apx_preds.h5", "w") as file:
        file["labels"] = np.ones((4, 5, 6), np.uint8)
    for shape, value, said in (((5, 6), 1, "3 axes"), ((4, 5, 6), 3, "only 0"), (None, 0, "readable HDF5")):
        mask.unlink()
        if shape is None:
            mask.write_text("no mask")
        else:
            with h5py.File(mask, "w") as file:
                file["labels"] = np.full(shape, value, np.uint8)
        found = jobs()
        assert said in found["TS_1"] and not found["TS_018_9.96Apx"]
    mask.unlink()
    found = jobs()
    assert "there must be a lamella mask for TS_1.mrc" in found["TS_1"] and not found["TS_018_9.96Apx"]
    with mrcfile.new(folder / "data" / "TS_1.mrc", overwrite=True) as mrc:
        mrc.set_data(np.zeros((5, 6), np.float32))
    mask.touch()
    assert "as many axes as the tomogram, which has 2" in jobs()["TS_1"]


def test_another_patch_than_the_model_was_trained_with_is_said(folder: Path) -> None:
    given = plan_run(configure(folder, parameters__data__patch_size=[32, 32, 32]))
    (warning,) = [w for w in given.warnings(1, None) if "trained with" in w]
    assert warning.startswith("patch_size is [32, 32, 32], but the model was trained with 16: ")
    for same in (None, [16, 16, 16]):
        assert not any(
            "trained with" in w
            for w in plan_run(configure(folder, parameters__data__patch_size=same)).warnings(1, None)
        )


def test_what_is_left_out_is_said_once(folder: Path) -> None:
    """Links that lead nowhere, names in capitals, and what macOS puts beside every file."""
    data = folder / "data"
    (data / "TS_3.mrc").symlink_to(folder / "not_mounted.mrc")
    (data / "TS_4.mrc").symlink_to(data / "TS_4.mrc")
    (data / "TS_5.MRC").touch()
    (data / "TS_6.mrc").mkdir()
    for name in ("._TS_1.mrc", ".TS_1.mrc"):
        (data / name).write_bytes(b"\0\5\x16\7")
    (data / "notes.txt").touch()
    configuration = configure(folder)
    plan = plan_run(configuration)
    assert [job.stem for job in plan.jobs] == ["TS_018_9.96Apx", "TS_1"]
    assert plan.notes == (
        f"left out of {data}: .TS_1.mrc (a hidden file), ._TS_1.mrc (macOS metadata of another file), "
        f"TS_3.mrc (a broken link to {folder}/not_mounted.mrc), "
        f"TS_4.mrc (a broken link to {data}/TS_4.mrc), TS_5.MRC (it must end with .mrc), TS_6.mrc (no file)",
    )
    assert plan_run(configuration, name="semantic").notes == ()  # the lamella's plan says it
    assert plan_run(configuration, filename="TS_1").notes == ()
    (found,) = problems(configuration, filename="TS_3.mrc")
    assert f"found TS_3.mrc (a broken link to {folder}/not_mounted.mrc)" in found
    console = Console(file=io.StringIO())
    print_overview(folder / "config.yaml", console, as_json=True)
    document = json.loads(console.file.getvalue())
    assert len(document["tomograms"]) == 2 and document["notes"] == list(plan.notes)
    for name in ("TS_1.mrc", "TS_018_9.96Apx.mrc"):
        (data / name).unlink()
    (found,) = problems(configuration)
    assert "found left out of" in found and "TS_5.MRC (it must end with .mrc)" in found


def test_filename_means_the_same_for_all_commands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = configure(folder)
    (folder / "out").mkdir()
    prediction = folder / "out" / "TS_1_preds.h5"
    prediction.touch()
    monkeypatch.chdir(folder)
    for name in ("TS_1", "TS_1.mrc", "data/TS_1.mrc", str(folder / "data" / "TS_1.mrc"), "../data/TS_1.mrc"):
        assert [source.name for source in find_tomograms(configuration, name)] == ["TS_1.mrc"]
        assert find_predictions(configuration, name) == [prediction]
    (folder / "data" / "sub").mkdir()
    shutil.copy(folder / "data" / "TS_1.mrc", folder / "data" / "sub")
    assert find_tomograms(configuration, "sub/TS_1.mrc") == [folder / "data" / "sub" / "TS_1.mrc"]
    assert find_predictions(configuration, "sub/TS_1") == [prediction]
    for name in ("elsewhere/TS_1.mrc", "out/TS_1", str(folder / "TS_1.mrc")):
        (found,) = problems(configuration, filename=name)
        assert "--filename: the tomogram must be a file in data_folder" in found
        with pytest.raises(ConfigurationError, match="--filename: the tomogram must be a file in data_folder"):
            find_predictions(configuration, name)


def test_hidden_predictions_are_none(folder: Path) -> None:
    configuration = configure(folder)
    (folder / "out").mkdir()
    for name in ("._TS_1_preds.h5", "TS_1_preds.h5"):
        (folder / "out" / name).touch()
    (folder / "out" / "TS_2_preds.h5").symlink_to(folder / "nowhere")
    assert find_predictions(configuration) == [folder / "out" / "TS_1_preds.h5"]
    assert left_out(folder / "out", "_preds.h5").endswith(f"TS_2_preds.h5 (a broken link to {folder}/nowhere)")
    with pytest.raises(TomogramError, match=r"a broken link to .*nowhere"):
        inspect(folder / "out" / "TS_2_preds.h5")
    (folder / "._TS_1.mrc").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X" + bytes(300))
    with pytest.raises(TomogramError, match=r"found macOS metadata of the file"):
        inspect(folder / "._TS_1.mrc")


def test_what_is_read_otherwise_than_before_is_another_input_and_nothing_else_is(folder: Path) -> None:
    """Outputs of earlier versions count as up to date, but where those read other voxels."""

    def same_as_before() -> bool:
        plan = plan_run(configure(folder, file_extension=source.suffix), filename=source.name)
        settings = settings_of(plan.configuration, plan.checkpoint, plan.patch, plan.threshold)
        made_of = [[source_identity(source), None], settings]
        before = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        return plan.jobs[0].prediction_fingerprint == before

    data = np.random.default_rng(0).normal(128, 20, (8, 8, 8)).astype(np.uint8)
    source = folder / "data" / "TS_1.mrc"
    assert same_as_before()
    for highest, same in ((-1, False), (200, True)):
        with mrcfile.new(source, data.view(np.int8), overwrite=True) as mrc:
            mrc.header.dmin, mrc.header.dmax = 0, highest
        assert same_as_before() == same
    source = folder / "data" / "a.h5"
    for names, same in (("zyx", True), ("xyz", False)):
        with h5py.File(source, "w") as file:
            dataset = file.create_dataset("data", data=data)
            for dimension, name in zip(dataset.dims, names, strict=True):
                dimension.label = name
        assert same_as_before() == same
