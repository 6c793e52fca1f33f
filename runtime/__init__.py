"""The code that runs bundles and judges them: the manifest, engines, parity, verify, benchmarks and the report."""
