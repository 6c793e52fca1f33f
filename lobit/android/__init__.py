"""The phone without a phone: builds the app, and runs the phone's own ExecuTorch library on Linux."""
