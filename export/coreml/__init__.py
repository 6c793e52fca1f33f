"""Target `coreml`: packages for Apple's Core ML."""
