"""Every verb of the command line as a function with the same name and parameters; the command only parses and prints."""

from lobit.verbs import android
from lobit.verbs.doctor import doctor
from lobit.verbs.evaluate import eval
from lobit.verbs.fetch import fetch
from lobit.verbs.learn import Texts, train
from lobit.verbs.make import choose_recipe, export, plan, quantize, recipes
from lobit.verbs.measure import bench, demo, report
from lobit.verbs.merge import merge
from lobit.verbs.prove import parity, verify
from lobit.verbs.sensitivity import sensitivity
from lobit.verbs.talk import chat, run

__all__ = [
    "Texts",
    "android",
    "bench",
    "chat",
    "choose_recipe",
    "demo",
    "doctor",
    "eval",
    "export",
    "fetch",
    "merge",
    "parity",
    "plan",
    "quantize",
    "recipes",
    "report",
    "run",
    "sensitivity",
    "train",
    "verify",
]
