"""Target `qnn`: Qualcomm's neural processor (HTP) through ExecuTorch."""
