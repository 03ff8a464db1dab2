"""What the claims about rotations are measured with."""
