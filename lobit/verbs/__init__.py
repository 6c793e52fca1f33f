"""Every verb of the command line as a function with the same name and parameters. The command only parses and prints."""

from lobit.verbs.make import choose_recipe, export, plan, quantize, recipes
from lobit.verbs.measure import bench, demo, doctor, report
from lobit.verbs.prove import parity, verify
from lobit.verbs.talk import chat, run

__all__ = ["bench", "chat", "choose_recipe", "demo", "doctor", "export", "parity", "plan", "quantize", "recipes", "report", "run", "verify"]
