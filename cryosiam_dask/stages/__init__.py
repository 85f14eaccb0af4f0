"""What happens to a tomogram, stage by stage; each is a function on chunked arrays."""
