"""Target `xnnpack`: an ExecuTorch program for the CPU, its products on the XNNPACK delegate."""
