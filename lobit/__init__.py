"""lobit: a trained language model on a phone, with proof that what runs there is what was trained."""

__version__ = "0.1.0"
