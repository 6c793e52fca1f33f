"""What runs a bundle and what judges it: manifest, engines, parity, verify, benchmarks, the report."""
