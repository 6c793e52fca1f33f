"""The command line of lm-evaluation-harness with bundles as models: `python -m lobit.harness --model lobit --model_args bundle=PATH …`.

The harness has no entry point by which another package could offer it a model, so the model is put into its registry here, before its
own command line runs with all of its options.
"""

from __future__ import annotations

import importlib

from lobit.exit_messages import one_message


def main() -> None:
    """Runs the harness; a user's mistake is shown as one message."""
    with one_message():
        importlib.import_module("lobit.harness_model")  # registers the model, or says what is missing
        importlib.import_module("lm_eval.__main__").cli_evaluate()


if __name__ == "__main__":
    main()
