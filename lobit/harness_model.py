"""Bundles, checkpoints and float models as the model `lobit` of lm-evaluation-harness.

The harness finds models in a registry of its own process. Importing this module puts `lobit` there; `lobit.harness` does that for the
command line.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lobit.errors import InputError, MissingPartError, listed, shown
from lobit.runtime.eval_requests import Encoder
from lobit.runtime.eval_scoring import Reader, Score
from lobit.runtime.generate import Sampling, generate
from lobit.verbs.evaluate import STAGES, columns_of

try:
    import lm_eval.models  # noqa: F401 (puts the harness's own models into the registry, which it leaves alone once another is there)
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import simple_parse_args_string
    from tqdm import tqdm
except ImportError as error:
    way = "pip install 'lobit[harness]', best in an environment of its own"
    raise MissingPartError(f"lm-evaluation-harness is not installed ({error}): {way}") from None

COUNTS = ("threads", "max_length")
"""Arguments that are numbers."""
IGNORED = ("batch_size", "max_batch_size", "device")
"""Arguments that other models of the harness have, and that its command line gives to all."""


@register_model("lobit")
class LobitLM(TemplateLM):  # type: ignore[misc]  # the harness carries no types
    """A model that lobit runs.

    Args:
        bundle: a bundle's folder; or a quantized checkpoint, a float model's folder, a hub name or `demo`, which PyTorch runs.
        threads: of a bundle's runtime; None: as the bundle says.
        max_length: the most tokens to read; None: as many as the model holds.
        batch_size: is taken from the command line and changes nothing: sequences are read one by one.
        max_batch_size: as `batch_size`.
        device: as `batch_size`; it is this machine.
    """

    def __init__(
        self,
        bundle: str,
        threads: int | None = None,
        max_length: int | None = None,
        batch_size: Any = 1,
        max_batch_size: Any = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        (column,) = columns_of([str(bundle)], None, STAGES, threads)
        self.column, self.tokenizer = column, column.tokenizer
        self.encoder = Encoder(column.tokenizer, min(column.context, max_length or column.context))
        self.engine = column.open(self.encoder.context)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> LobitLM:
        """The model that a text such as `bundle=PATH,threads=2` describes; see `create_from_arg_obj`."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None) -> LobitLM:
        """The model that `--model_args` describe.

        Args:
            arg_dict: what the user gave.
            additional_config: what the harness adds, which the user's own arguments replace.

        Raises:
            InputError: arguments are missing, unknown or not usable; all of these are named.
        """
        _check_arguments(arg_dict)
        return cls(**{**(additional_config or {}), **arg_dict})

    @property
    def max_length(self) -> int:
        """The most tokens that the model holds."""
        return self.encoder.context

    @property
    def max_gen_toks(self) -> int:
        """The most tokens of an answer where a task says nothing, as the harness's other models have it."""
        return 256

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text."""
        return next(iter(self.tokenizer.stop), None)

    @property
    def prefix_token_id(self) -> int | None:
        """The token that stands for an empty context."""
        return self.encoder.prefix

    @property
    def tokenizer_name(self) -> str:
        """Name under which the harness keeps what it has rendered."""
        return self.column.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The tokens of a text."""
        return self.encoder.encode(string) if add_special_tokens is None else self.tokenizer.encode(string, bos=add_special_tokens)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the model's template, where the harness is told to use it."""
        return (self.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the text that the model reads."""
        return self.tokenizer.render_chat(chat_history, add_generation_prompt)

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any) -> list[Score]:
        """The likelihoods of continuations; those of one context that follow each other read it once."""
        reader, found = Reader(self.engine), []
        with tqdm(total=len(requests), disable=disable_tqdm, desc="lobit: likelihoods") as bar:
            for _, group in itertools.groupby(requests, key=lambda request: request[1]):
                of_context = list(group)
                scores = reader.score([self.encoder.asked(given, asked) for _, given, asked in of_context])
                for (texts, _, _), score in zip(of_context, scores, strict=True):
                    self.cache_hook.add_partial("loglikelihood", texts, score)
                found += scores
                bar.update(len(scores))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The likelihoods of whole texts; a tokenizer that adds bos has it twice at the beginning, as in the harness's other models."""
        reader, found = Reader(self.engine), []
        for (text,) in tqdm([request.args for request in requests], disable=disable_tqdm, desc="lobit: texts"):
            windows = list(self.encoder.rolling(self.tok_encode(text)))
            found.append(sum(value for value, _ in reader.score(windows)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts that continue contexts, each up to a stop."""
        found = []
        for context, options in tqdm([request.args for request in requests], disable=disable_tqdm, desc="lobit: texts to write"):
            found.append(self._generated(context, normalize_gen_kwargs(options, self.max_gen_toks)))
            self.cache_hook.add_partial("generate_until", (context, options), found[-1])
        return found

    def _generated(self, context: str, options: Mapping[str, Any]) -> str:
        most, until = options["max_gen_toks"], handle_stop_sequences(options.get("until"), None)
        room = self.max_length - most
        if room < 1:
            raise InputError(f"{most} new tokens do not fit into the context of {self.max_length}: give --gen_kwargs max_gen_toks=N")
        self.engine.reset()
        tokens, sampling = self.tok_encode(context)[-room:], _sampling(options)
        generation = generate(self.engine, tokens, max_new_tokens=most, sampling=sampling, stop=self.tokenizer.stop)
        text = ""
        for _ in generation:
            text = self.tokenizer.decode(generation.tokens)
            if any(stop in text for stop in until if stop):
                break
        return str(postprocess_generated_text(text, until, None))


def _check_arguments(given: Mapping[str, Any]) -> None:
    """Refuses arguments that `LobitLM` cannot use."""
    known = ("bundle", *COUNTS, *IGNORED)
    problems = [f"there is no {shown(name)}: the arguments are bundle, {', '.join(COUNTS)}" for name in given if name not in known]
    bundle = given.get("bundle")
    if "bundle" not in given:
        problems.append("bundle is missing: give bundle=PATH of a bundle, a quantized checkpoint or a float model")
    elif not isinstance(bundle, (str, Path, int)) or isinstance(bundle, bool) or bundle == "":
        problems.append(f"bundle is {shown(bundle)}: give the path of a bundle, a quantized checkpoint or a float model")
    for name in COUNTS:
        value = given.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            problems.append(f"{name} is {shown(value)}: give a whole number, 1 or more, or leave it out")
    if problems:
        raise InputError(listed(problems, "--model_args cannot be used:"))


def _sampling(options: Mapping[str, Any]) -> Sampling:
    """How a task wants tokens chosen: the most probable ones unless it says `do_sample`."""
    if not options.get("do_sample"):
        return Sampling()
    return Sampling(temperature=options.get("temperature", 1.0), top_k=options.get("top_k", 0), top_p=options.get("top_p", 1.0))
