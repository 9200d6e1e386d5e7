"""The sections of a recipe, as typed models. `siftrl.recipe` puts them together; import them from there."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from siftrl import plugins
from siftrl.fields import Count, Positive
from siftrl.recipe_text import RecipeError, kind_of

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]*[A-Za-z_-][A-Za-z0-9_.-]*$")]
"""A name that can be a folder's, and is not a number (numbers are list indices in overrides)."""
Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """What all sections share: unknown keys are errors, and "3" is no number."""

    model_config = ConfigDict(
        strict=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


class ScratchConfig(Section):
    """A small model with random weights and a character tokenizer, made on the spot."""

    architecture: Literal["qwen3", "llama"] = "qwen3"
    hidden_size: Count = 192
    num_layers: Count = 4
    num_heads: Count = 6
    num_kv_heads: Count | None = None
    """Key/value heads; null: as many as `num_heads`."""
    head_dim: Count | None = None
    """Width of one head; null: hidden_size / num_heads."""
    intermediate_size: Count | None = None
    """Width inside the MLP; null: 4 x hidden_size."""
    max_positions: Count = 512
    tie_embeddings: bool = True
    tokenizer: Literal["characters"] = "characters"
    alphabet: str | None = None
    """The characters that the tokenizer knows; null: printable ASCII and the line break."""

    @model_validator(mode="after")
    def fill(self) -> ScratchConfig:
        if self.alphabet == "":
            raise RecipeError("is empty; write the characters that the model shall know", "alphabet")
        if self.num_kv_heads is None:
            self.num_kv_heads = self.num_heads
        if self.num_heads % self.num_kv_heads:
            raise RecipeError(f"{self.num_kv_heads} does not divide num_heads {self.num_heads}", "num_kv_heads")
        if self.head_dim is None:
            if self.hidden_size % self.num_heads:
                raise RecipeError(
                    f"{self.num_heads} does not divide hidden_size {self.hidden_size}; change one or give head_dim",
                    "num_heads",
                )
            self.head_dim = self.hidden_size // self.num_heads
        if self.head_dim % 2:
            raise RecipeError(f"{self.head_dim} is odd; rotary embeddings need an even width", "head_dim")
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        return self


class LoraConfig(Section):
    """Low-rank adapters (peft)."""

    r: Count = 16
    alpha: Positive = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | list[str] = "all-linear"
    """"all-linear", or names of the modules to adapt."""


class ModelConfig(Section):
    """The policy: `path` (a local folder or a hub name) or `scratch`."""

    path: str | None = None
    """A local folder or a hub name."""
    scratch: ScratchConfig | None = None
    """Make a model with random weights instead."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 for full fine-tuning, else the checkpoint's own. Full fine-tuning in 16 bits needs DeepSpeed."""
    revision: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    """eager, sdpa, flash_attention_2, ...; null: the library's choice."""
    lora: LoraConfig | None = None
    """Train low-rank adapters; null: train every weight."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Load the base weights quantised (bitsandbytes, CUDA); needs `lora`."""

    @model_validator(mode="after")
    def one_source(self) -> ModelConfig:
        if (self.path is None) == (self.scratch is None):
            raise RecipeError("give exactly one of `path` (a local folder or a hub name) and `scratch`")
        if self.scratch and self.quantize:
            raise RecipeError("weights made from scratch are not quantised; remove it or give `path`", "quantize")
        if self.quantize and not self.lora:
            raise RecipeError("quantised weights cannot be trained; add `lora: {}` to train adapters", "quantize")
        return self


class ReasoningGymTask(Section):
    """One family of reasoning-gym."""

    name: str
    weight: Positive = 1.0
    """Share of the rows, relative to the other tasks' weights."""
    config: dict[str, Any] = {}
    """That family's own settings, for example {min_terms: 2, max_terms: 3}."""


class ReasoningGymConfig(Section):
    """Rows made by the reasoning-gym library."""

    tasks: Annotated[list[ReasoningGymTask], Field(min_length=1)]
    size: Count = 10000
    seed: int = 0


class EvalDataConfig(Section):
    """Held-out rows: loaded from `path`, or `size` rows that are taken out of the training set."""

    path: str | None = None
    config: str | None = None
    split: str = "test"
    revision: str | None = None
    size: Count | None = None
    """Without `path`: rows held out of the training set (reasoning_gym: generated with another seed). With `path`:
    the first rows."""
    seed: int | None = None
    """reasoning_gym only; null: the training rows' seed + 1."""

    @model_validator(mode="after")
    def some_source(self) -> EvalDataConfig:
        if self.path is None and self.size is None:
            raise RecipeError("give `size` (rows to hold out) or `path`")
        return self


class DataConfig(Section):
    """Rows to train on: `path` or `reasoning_gym`."""

    path: str | None = None
    """A local .json, .jsonl, .csv or .parquet file, a folder or glob of them, or a hub name."""
    config: str | None = None
    """The hub data set's configuration."""
    split: str = "train"
    revision: str | None = None
    reasoning_gym: ReasoningGymConfig | None = None
    prompt: str | None = None
    """The column that holds the prompt, text or chat messages; null: "prompt" ("question" for reasoning_gym)."""
    completion: str | None = None
    """The column that holds the target completion (SFT); null: "completion" ("answer" for reasoning_gym)."""
    chosen: str = "chosen"
    """The column that holds the preferred completion (DPO), or the whole conversation with it."""
    rejected: str = "rejected"
    """The column that holds the other completion (DPO), or the whole conversation with it."""
    prompt_template: str | None = None
    """Makes a plain prompt out of a row's columns, for example "{question}="."""
    system_prompt: str | None = None
    """Put in front as a system message; makes chat prompts out of plain ones."""
    chat: bool = False
    """Wrap a plain prompt as one user message."""
    source: str | None = None
    """The column that names where each row comes from; null: "task" for reasoning_gym, else none."""
    max_prompt_tokens: Count | None = None
    long_prompts: Literal["drop", "error"] = "drop"
    """What to do with longer prompts; dropped ones are counted and reported."""
    limit: Count | None = None
    """Only the first rows."""
    eval: EvalDataConfig | None = None
    """Held-out rows; null: none."""

    @model_validator(mode="after")
    def one_source(self) -> DataConfig:
        if (self.path is None) == (self.reasoning_gym is None):
            raise RecipeError("give exactly one of `path` (a file, a folder or a hub name) and `reasoning_gym`")
        from_gym = self.reasoning_gym is not None
        self.prompt = self.prompt or ("question" if from_gym else "prompt")
        self.completion = self.completion or ("answer" if from_gym else "completion")
        self.source = self.source or ("task" if from_gym else None)
        return self


class RewardConfig(Section):
    """One reward: a file in rewards/, or `package.module:name`."""

    name: str
    weight: Annotated[float, Field(ge=-1e6, le=1e6)] = 1.0
    time_limit: Positive | None = 60.0
    """Seconds that a call with up to 64 rows may take, in proportion for more; null: no limit."""
    workers: Annotated[int, Field(ge=0)] | None = None
    """Most processes that judge, on each rank, for a reward that judges row by row; null: this rank's share of the
    cores, 8 at most; 0: the trainer's own process."""
    on_error: Literal["stop", "missing"] = "stop"
    """When it raises, hangs, or returns NaN or the wrong count: stop the run, or score those rows as missing."""
    options: dict[str, Any] = {}
    """The reward's own keys; `siftrl list rewards` shows them."""

    @model_validator(mode="before")
    @classmethod
    def from_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def check_options(self) -> RewardConfig:
        plugins.find("reward", self.name)
        try:
            self.options = plugins.validate("reward", self.name, self.options)
        except plugins.PluginError as error:
            raise RecipeError(error.problem, "options", *error.key) from None
        return self


class _PluginSection(BaseModel):
    """A selector's name, with its own keys beside the name."""

    model_config = ConfigDict(strict=True, extra="allow", use_attribute_docstrings=True)
    name: str

    @model_validator(mode="before")
    @classmethod
    def from_name(cls, data: Any) -> Any:
        return {"name": data} if isinstance(data, str) else data

    @property
    def options(self) -> dict[str, Any]:
        """The selector's own keys, checked, defaults included."""
        return dict(self.__pydantic_extra__ or {})


class SelectorConfig(_PluginSection):
    """A prompt selector by name, with its own keys beside the name; `siftrl list selectors` shows them."""

    @model_validator(mode="after")
    def check_options(self) -> SelectorConfig:
        plugin = plugins.find("selector", self.name)
        if plugin.role != "prompt":
            problem = "selects inside a batch; write a selector of prompts, and this one under `batch_selector`"
            raise RecipeError(f"{self.name!r} {problem}", "name")
        self.__pydantic_extra__ = plugins.validate("selector", self.name, self.options)
        return self


Keep = Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)]
"""A number of rows (1 is one row), or a share of them (1.0 is all)."""


class BatchSelectorConfig(_PluginSection):
    """A batch selector by name, with `keep` and its own keys beside it; `siftrl list selectors` shows them."""

    keep: Keep = 0.5
    """A share, such as 0.5, of the rows that it is given, or a number of rows, such as 32, over all ranks."""

    @field_validator("keep", mode="before")
    @classmethod
    def rows_or_share(cls, value: Any) -> Any:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not (value >= 1 if isinstance(value, int) else 0 < value <= 1):
            wanted = "a share above 0 and up to 1.0, or a whole number of rows from 1 on"
            raise RecipeError(f"must be {wanted}, not {kind_of(value)}")
        return value

    @model_validator(mode="after")
    def check_options(self) -> BatchSelectorConfig:
        plugin = plugins.find("selector", self.name)
        if plugin.role != "batch":
            problem = "selects prompts before the rollouts; write a selector of rows, and this one in a grpo stage"
            raise RecipeError(f"{self.name!r} {problem} under `prompt_selector`", "name")
        for key in ("name", "keep"):
            if key in plugin.fields:
                problem = f"has a field {key!r}, which is a key of every batch selector; give it another name"
                raise RecipeError(f"{self.name!r} {problem}", "name")
        self.__pydantic_extra__ = plugins.validate("selector", self.name, self.options)
        return self


class SignalsConfig(Section):
    """How the rows are scored that a batch selector chooses from."""

    micro_batch_size: Count | None = None
    """Rows scored in one forward pass; null: the stage's `micro_batch_size`."""
    block: str | None = None
    """Dotted name of the model's last block; null: found by the model's structure."""
    value: str | None = None
    """Dotted name of the V projection, inside the block; null: found by the model's structure."""
    head: str | None = None
    """Dotted name of the head; null: found by the model's structure."""


class SelectionConfig(Section):
    """What choosing the rows of a step may cost, and what becomes of completions that teach nothing."""

    max_overhead: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of a step's seconds that scoring and choosing may take; null: no limit."""
    skip_zero_advantage: bool | None = None
    """grpo only: do not run completions whose advantage is 0, which have no gradient. null: where a batch selector had
    to take some, since too few have one; true: always, without a batch selector too; false: never. The step is TRL's up
    to rounding, but for `loss_type: bnpo`, which divides by the whole step's tokens here."""


class RolloutConfig(Section):
    """How completions are generated."""

    engine: Literal["transformers", "vllm"] = "transformers"
    mode: Literal["colocate", "server"] = "colocate"
    """vllm only: in the training process, or a server of its own."""
    temperature: Annotated[float, Field(ge=1e-3)] = 1.0
    """Logits divided by less lose their differences to rounding; `eval` has `greedy`."""
    top_p: Fraction = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """0: off."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Positive = 1.0
    max_completion_tokens: Count = 256
    seeded: bool | None = None
    """Make every completion a function of (seed, step, row), whatever the number of ranks; null: whenever a selector
    is on."""
    max_logprob_drift: Positive | Literal["auto"] | None = "auto"
    """vllm: stop when the engine's and the trainer's log-probabilities differ by more, mean over probe tokens, after
    a weight sync; auto: 0.005 in float32, else 0.1; null: no probe."""
    engine_args: dict[str, Any] = {}
    """Colocated vllm: further arguments of vllm.LLM."""
    gpu_memory_utilization: Fraction = 0.3
    tensor_parallel_size: Count = 1
    max_model_len: Count | None = None
    sleep: bool = False
    """Free vLLM's memory while the trainer updates."""
    server_url: str | None = None
    """Server mode; null: http://localhost:8000."""
    server_timeout: Positive = 240.0
    """Seconds to wait for the server."""


class EvalConfig(Section):
    """Evaluation on the held-out rows: before and after a stage, and in between.

    grpo: the mean reward. sft: the loss, and the mean reward where rewards are named. dpo: loss and accuracy.
    """

    every: Count | None = None
    """Also every so many optimizer steps; null: only before and after."""
    samples: Count = 1
    """Completions a prompt."""
    greedy: bool = True
    batch_size: Count = 256
    """Completions generated at once."""
    max_completion_tokens: Count | None = None
    """sft: longer completions are cut; null: 256. In grpo the rollout's counts."""

    @model_validator(mode="after")
    def one_greedy_sample(self) -> EvalConfig:
        if self.greedy and self.samples > 1:
            raise RecipeError(f"{self.samples} greedy completions are all the same; write `greedy: false`", "samples")
        return self


class DistributionConfig(Section):
    """How training is spread over processes. Without DeepSpeed, several processes train data-parallel (DDP)."""

    deepspeed: str | dict[str, Any] | None = None
    """zero1, zero2, zero3, the path of a JSON file, or the settings themselves; null: no DeepSpeed."""


class CheckpointConfig(Section):
    """Checkpoints to resume from."""

    every: Count | None = 100
    """Optimizer steps between checkpoints; null: only when interrupted."""
    keep: Annotated[int, Field(ge=2)] = 2
    """How many of a stage's checkpoints to keep; at least 2, since the newest may be cut short by a crash."""


class LoggingConfig(Section):
    """What the run folder records."""

    every: Count = 10
    """Optimizer steps between log lines."""
    samples: Annotated[int, Field(ge=0)] = 4
    """Completions of each rollout step that are written to samples.jsonl."""
    selection: bool = True
    """Write selection.jsonl: every candidate of every step, and why it was chosen."""
    halt_on_no_signal: Count | None = None
    """grpo only: stop the run after so many optimizer steps in a row without a prompt whose completions' rewards
    differ; null: only warn."""


class OutputConfig(Section):
    """Where the run folder goes."""

    dir: str = "runs"
    """The run folder is dir/name."""
    overwrite: bool = False
    """Replace a run that is in that folder already."""
