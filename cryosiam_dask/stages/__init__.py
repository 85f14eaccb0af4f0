"""What happens to a tomogram: each stage is a function on chunked arrays."""
