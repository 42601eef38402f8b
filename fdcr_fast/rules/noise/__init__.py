"""Rules that add noise, and random draws that clients cannot foresee."""
