from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import write_rows

from siftrl.data import load_data, load_rows
from siftrl.gym_rows import decode, encode, make_rows, score
from siftrl.models import character_tokenizer
from siftrl.recipe import DataConfig, ReasoningGymConfig
from siftrl.row_shapes import fill

TOKENIZER = character_tokenizer()
ROWS = [{"prompt": f"{a}+{b}=", "answer": str(a + b), "source": "sums"} for a in range(4) for b in range(5)]


pytestmark = pytest.mark.usefixtures("data_cache")


def config(**keys: Any) -> DataConfig:
    return DataConfig.model_validate(keys)


def gym(size: int = 40, **keys: Any) -> DataConfig:
    sums = {"name": "chain_sum", "weight": 3, "config": {"min_terms": 2, "max_terms": 2, "max_digits": 2}}
    count = {"name": "letter_counting", "config": {"min_words": 3, "max_words": 5}}
    return config(reasoning_gym={"tasks": [sums, count], "size": size}, **keys)


def load(data: DataConfig, kind: Any = "grpo", tokenizer: Any = TOKENIZER) -> Any:
    return load_data(data, kind, tokenizer)


# ------------------------------------------------------------------------------------------------------- sources


def test_all_local_formats_give_the_same_rows(tmp_path: Path) -> None:
    stored = datasets.Dataset.from_list(ROWS)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    write_rows(tmp_path / "rows.jsonl", ROWS)
    stored.to_csv(tmp_path / "rows.csv")
    stored.to_parquet(tmp_path / "rows.parquet")
    stored.save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    write_rows(tmp_path / "folder" / "a.jsonl", ROWS[:7])
    write_rows(tmp_path / "folder" / "b.jsonl", ROWS[7:])
    names = ["rows.json", "rows.jsonl", "rows.csv", "rows.parquet", "saved", "folder", "folder/*.jsonl"]
    for name in names:
        assert load(config(path=str(tmp_path / name))).train.to_list() == ROWS, name


def test_csv_cells_stay_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,answer\n1+6=,007\nnothing?,None\n")
    assert load(config(path=str(tmp_path / "rows.csv"))).train["answer"][:] == ["007", "None"]


def test_a_local_file_serves_any_split_name_and_slices(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    assert len(load_rows(path, split="test")) == 20
    assert len(load_rows(path, split="train[:10%]")) == 2
    with pytest.raises(ValueError, match="data.split: 'train.x.': Unrecognized"):
        load_rows(path, split="train[x]")


def test_splits_of_folders_and_saved_sets_are_kept_apart(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for name, rows in (("train", ROWS[:8]), ("test", ROWS[8:12])):
        write_rows(tmp_path / "files" / f"{name}.jsonl", rows)
    saved = {name: load_rows(str(tmp_path / "files" / f"{name}.jsonl")) for name in ("train", "test")}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    for folder in ("files", "saved"):
        path = str(tmp_path / folder)
        assert list(load_rows(path)) == ROWS[:8] and list(load_rows(path, split="test")) == ROWS[8:12]
        assert list(load_rows(path, split="train[:25%]+test[-1:]")) == [*ROWS[:2], *ROWS[11:12]]
        splits = load(config(path=path, eval={"path": path}))
        assert (len(splits.train), len(splits.eval)) == (8, 4)
        with pytest.raises(ValueError, match="data.split: .* split 'dev'"):
            load_rows(path, split="dev")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "there is no file"),
        ("rows.txt", "x", "is no .json"),
        ("broken.jsonl", '{"prompt": "a"}\n{"prompt": \n', "broken.jsonl"),
        ("empty.jsonl", "", "empty.jsonl"),
    ],
)
def test_unreadable_files_are_one_line_errors(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(config(path=str(tmp_path / name)))
    assert str(caught.value).startswith("data.path:") and "\n" not in str(caught.value)


def test_unknown_hub_name_is_a_one_line_error() -> None:
    with pytest.raises(ValueError, match="data.path: nobody/no-such-set: cannot be loaded") as caught:
        load(config(path="nobody/no-such-set"))
    assert "\n" not in str(caught.value)


def test_folder_without_rows_and_folder_of_two_kinds(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no .json"):
        load(config(path=str(tmp_path)))
    write_rows(tmp_path / "a.jsonl", ROWS)
    datasets.Dataset.from_list(ROWS).to_csv(tmp_path / "b.csv")
    with pytest.raises(ValueError, match="several kinds"):
        load(config(path=str(tmp_path)))


# -------------------------------------------------------------------------------------------- columns and prompts


def test_missing_columns_name_those_that_are_there(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match="data.prompt: there is no column 'promt'; did you mean 'prompt'") as caught:
        load(config(path=path, prompt="promt"))
    assert "answer, source" in str(caught.value)
    with pytest.raises(ValueError, match="data.completion: there is no column 'completion'"):
        load(config(path=path), "sft")
    with pytest.raises(ValueError, match="data.prompt_template: there is no column 'question'"):
        load(config(path=path, prompt_template="{question}"))


def test_sft_rows_have_completions_of_the_prompts_kind(tmp_path: Path) -> None:
    rows = [{"q": "1+1=", "a": 2, "text": "unused"}, {"q": "1+2=", "a": 3, "text": "unused"}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    splits = load(config(path=path, prompt="q", completion="a"), "sft")
    assert splits.train[0] == {"q": "1+1=", "a": 2, "prompt": "1+1=", "completion": "2"}
    assert splits.report["ignored_columns"] == ["text"]  # TRL would train on it instead
    chat = load(config(path=path, prompt="q", completion="a", system_prompt="Add."), "sft").train[1]
    assert chat["prompt"] == [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+2="}]
    assert chat["completion"] == [{"role": "assistant", "content": "3"}]


def test_a_conversation_is_split_before_its_last_turn_for_sft_and_refused_for_grpo(tmp_path: Path) -> None:
    user, assistant = {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": [user, assistant]}])
    row = load(config(path=path, prompt="messages"), "sft").train[0]
    assert row == {"prompt": [user], "completion": [assistant]}
    with pytest.raises(ValueError, match="row 0: the prompt ends with an assistant's message"):
        load(config(path=path, prompt="messages"))


# ------------------------------------------------------------------------------------------------- preference pairs


def test_pairs_have_two_completions_of_the_prompts_kind(tmp_path: Path) -> None:
    right = {"prompt": "1+1=", "better": 2, "worse": 3, "chosen_ids": [1]}
    rows = [right, {"prompt": "1+2=", "better": 3}, {"prompt": "1+3=", "better": 4, "worse": 4}]
    splits = load(config(path=write_rows(tmp_path / "rows.jsonl", rows), chosen="better", rejected="worse"), "dpo")
    (row,) = splits.train.to_list()
    assert row == {"prompt": "1+1=", "better": 2, "worse": 3, "chosen": "2", "rejected": "3"}
    assert splits.report["dropped"] == {"empty completion": 1, "equal completions": 1}
    assert splits.report["ignored_columns"] == ["chosen_ids"]


def test_pairs_of_whole_conversations_share_all_but_their_last_message(tmp_path: Path) -> None:
    ask, good, bad = ({"role": r, "content": c} for r, c in (("user", "1+1="), ("assistant", "2"), ("assistant", "3")))
    tokenizer = character_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    row = {"prompt": "not read", "chosen": [ask, good, ask, good], "rejected": [ask, good, ask, bad]}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    shaped = load(config(path=path, system_prompt="Add."), "dpo", tokenizer).train[0]
    assert shaped["prompt"] == [{"role": "system", "content": "Add."}, ask, good, ask]
    assert (shaped["chosen"], shaped["rejected"]) == ([good], [bad])
    for changed, message in (
        ({"rejected": [ask, bad, ask, bad]}, "row 0: chosen and rejected must be one conversation up to their last"),
        ({"rejected": [ask, good, ask, ask]}, "row 0: rejected: the last message must be the assistant's"),
        ({"rejected": []}, "row 0: chosen and rejected must be one conversation"),
    ):
        path = write_rows(tmp_path / "bad.jsonl", [row | changed])
        with pytest.raises(ValueError, match=message):
            load(config(path=path), "dpo", tokenizer)


def test_pairs_without_their_columns_or_with_unknown_characters_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "chosen": "2", "reject": "3"}])
    with pytest.raises(ValueError, match="data.rejected: there is no column 'rejected'; did you mean 'reject'"):
        load(config(path=path), "dpo")
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1+1=", "chosen": "2", "rejected": "３"}])
    with pytest.raises(ValueError, match="row 0: rejected: the model's tokenizer does not know '３'"):
        load(config(path=path), "dpo")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([{"role": "user", "text": "hi"}], "content must be text"),
        ([{"content": "hi"}], "message 0 must be"),
        ([{"role": "user", "content": "hi", "name": "x"}], "message 0 has name"),
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "a system message already"),
        (12, "must be text or a list of messages, not 12"),
    ],
)
def test_malformed_prompts_name_the_row(tmp_path: Path, prompt: Any, message: str) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": prompt}])
    with pytest.raises(ValueError, match=message) as caught:
        load(config(path=path, system_prompt="s"))
    assert "row 0" in str(caught.value)


def test_sources_are_text_and_survive_into_sft_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+1=", "completion": str(i + 1), "family": name} for i, name in enumerate("aabab")]
    splits = load(config(path=write_rows(tmp_path / "rows.jsonl", rows), source="family"), "sft")
    assert splits.train["family"][:] == ["a", "a", "b", "a", "b"]
    assert splits.report["sources"] == {"a": 3, "b": 2}
    assert "sources" not in load(config(path=str(tmp_path / "rows.jsonl")), "sft").report
    assert load(gym(), "sft").report["sources"] == {"chain_sum": 30, "letter_counting": 10}
    assert load(gym(source="task"), "grpo").report["sources"] == {"chain_sum": 30, "letter_counting": 10}


def test_numbers_become_names_of_sources_and_missing_ones_stay_missing(tmp_path: Path) -> None:
    # The number of rows makes the first batch that is written all missing.
    rows = [{"prompt": f"{i}=", "completion": "x", "id": None if i < 1500 else i % 2} for i in range(1502)]
    splits = load(config(path=write_rows(tmp_path / "rows.jsonl", rows), source="id"), "sft")
    assert splits.train["id"][1498:] == [None, None, "0", "1"]
    assert splits.report["sources"] == {"": 1500, "0": 1, "1": 1}


def test_sources_are_counted_after_held_out_and_dropped_rows_and_only_the_largest_are_reported(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}=", "completion": "x" if i else "", "source": f"s{i // 2}"} for i in range(48)]
    splits = load(config(path=write_rows(tmp_path / "rows.jsonl", rows), source="source", eval={"size": 3}), "sft")
    sources = splits.report["sources"]
    assert len(splits.train) == 44 and len(sources) == 20
    assert set(sources.values()) == {2} and not {"s0", "s22", "s23"} & set(sources)
    assert "sources" not in splits.report["eval"]


def test_a_column_of_sources_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": "b", "family": ["x"], "text": "y", "number": 1}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match="data.source: there is no column 'familly'; did you mean 'family'"):
        load(config(path=path, source="familly"), "sft")
    with pytest.raises(ValueError, match=r"data.source: row 0 has \['x'\] as its family; it must be text or a number"):
        load(config(path=path, source="family"), "sft")
    with pytest.raises(ValueError, match="data.source: 'text' is a name that the trainer reads; rename the column"):
        load(config(path=path, source="text"), "sft")
    assert load(config(path=path, source="text"), "grpo").train["text"][:] == ["y"]


def test_names_of_reward_arguments_are_refused_as_columns(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completions": "b"}])
    with pytest.raises(ValueError, match="'completions' has the name .* rename"):
        load(config(path=path))


def test_empty_and_long_prompts_are_dropped_and_counted(tmp_path: Path) -> None:
    prompts = ["ab", "", "  ", None, "abcdefgh", "abc"]
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": p} for p in prompts])
    splits = load(config(path=path, max_prompt_tokens=4))
    assert splits.train["prompt"][:] == ["ab", "abc"]
    assert splits.report["dropped"] == {"empty prompt": 3, "long prompt": 1}
    assert splits.report["prompt_tokens"] == {"mean": 2.5, "max": 3}
    with pytest.raises(ValueError, match="row 4 has a prompt of 8 tokens, more than 4"):
        load(config(path=path, max_prompt_tokens=4, long_prompts="error"))
    with pytest.raises(ValueError, match="all 6 training rows were dropped"):
        load(config(path=path, max_prompt_tokens=1))


def test_the_first_dropped_row_may_come_late(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}] * 1500 + [{"prompt": None}])
    assert load(config(path=path)).report["dropped"] == {"empty prompt": 1}


def test_characters_the_tokenizer_does_not_know_are_refused(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "1+1=", "completion": "deux"}, {"prompt": "2÷1=", "completion": "é"}]
    )
    with pytest.raises(ValueError, match="row 1: prompt: .* does not know '÷'"):
        load(config(path=path))
    with pytest.raises(ValueError, match="row 0: completion: .* does not know 'd' 'e' 'u' 'x'"):
        load(config(path=path), "sft", character_tokenizer("0123456789+=÷"))


def test_chat_prompts_need_a_chat_template(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    tokenizer = character_tokenizer()
    assert load(config(path=path, chat=True)).report["prompt_tokens"]["max"] == 6  # the text and two role tokens
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        load(config(path=path, chat=True), tokenizer=tokenizer)


# ---------------------------------------------------------------------------------------------- nulls, names, forms


def test_rows_with_a_null_in_the_template_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{"q": "1+1", "hint": "add"}, {"q": "1+2", "hint": None}, {"q": "1+3"}, {"q": "1+4", "hint": ""}]
    splits = load(config(path=write_rows(tmp_path / "rows.jsonl", rows), prompt_template="{hint}: {q}="))
    assert splits.train["prompt"][:] == ["add: 1+1=", ": 1+4="]
    assert splits.report["dropped"] == {"null in prompt_template": 2}
    assert fill("{a[x]} {b:>{width}}", {"a": {"x": 43.0}, "b": 7, "width": 3}) == "43   7"
    assert fill("{a[x]}", {"a": {"x": None}}) is None
    for template, message in (("{q", "expected '}'"), ("{}", "there is no column"), ("{q[", "does not fit|expected")):
        with pytest.raises(ValueError, match=f"data.prompt_template: .*({message})"):
            load(config(path=str(tmp_path / "rows.jsonl"), prompt_template=template))


def test_columns_of_any_name_reach_the_rewards(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1=", "drop_reason": "none", "siftrl_row": 7, "measured": [1]}] * 2
    assert load(config(path=write_rows(tmp_path / "rows.jsonl", rows))).train[1] == rows[1]


def test_a_completion_is_text_a_number_or_messages(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "1", "completion": {"answer": 2}}])
    with pytest.raises(ValueError, match="row 0: completion: must be text, a number or a list of messages, not {'ans"):
        load(config(path=path), "sft")


def test_one_set_holds_plain_prompts_or_chat_messages(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": None}, {"prompt": "hi"}, {"prompt": [{"role": "user", "content": "hi"}]}]
    with pytest.raises(ValueError, match="row 2: one set cannot hold both plain prompts and chat messages"):
        load(config(path=write_rows(tmp_path / "rows.jsonl", rows)))
    chat = [{"prompt": []}] * 1001 + rows[2:]  # the first rows that are written have no message
    assert load(config(path=write_rows(tmp_path / "rows.jsonl", chat))).train["prompt"][:] == [rows[2]["prompt"]]


# ------------------------------------------------------------------------------------------------------- held out


def test_held_out_rows_come_from_the_end_and_leave_training(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", ROWS[:10] + ROWS[3:5])  # the last two occur before as well
    splits = load(config(path=path, eval={"size": 2}))
    assert splits.eval["prompt"][:] == [row["prompt"] for row in ROWS[3:5]]
    assert splits.train["prompt"][:] == [row["prompt"] for row in ROWS[:3] + ROWS[5:10]]
    assert splits.report["dropped"] == {"also held out": 2} and splits.report["rows"] == 8
    with pytest.raises(ValueError, match="data.eval.size: 12 leaves nothing"):
        load(config(path=path, eval={"size": 12}))
    assert len(load(config(path=path, limit=4)).train) == 4


def test_held_out_rows_of_their_own_file(tmp_path: Path) -> None:
    train, held = write_rows(tmp_path / "train.jsonl", ROWS), write_rows(tmp_path / "held.jsonl", ROWS[18:] * 2)
    splits = load(config(path=train, eval={"path": held, "size": 3}))
    assert (len(splits.train), len(splits.eval)) == (18, 3)
    with pytest.raises(ValueError, match="every training prompt is also held out"):
        load(config(path=train, eval={"path": train}))
    with pytest.raises(ValueError, match="data.eval.path: there is no file"):
        load(config(path=train, eval={"path": str(tmp_path / "none.jsonl")}))


# -------------------------------------------------------------------------------------------------- reasoning-gym


def test_reasoning_gym_rows_are_shares_of_the_weights_and_repeatable() -> None:
    splits = load(gym(eval={"size": 8}))
    assert sorted(set(splits.train["task"][:])) == ["chain_sum", "letter_counting"]
    assert splits.train["task"][:].count("chain_sum") == 30
    assert splits.train["task"][:20].count("chain_sum") not in (0, 20)  # mixed, not one after the other
    assert splits.train.to_list() == load(gym(eval={"size": 8})).train.to_list()
    assert not set(splits.train["prompt"]) & set(splits.eval["prompt"]) and len(splits.eval) == 8
    assert "completion" in load(gym(), "sft").train.column_names


def test_seeds_are_independent_and_templates_see_the_metadata() -> None:
    """The library's seeds s and s + 1 share all rows but one; ours must not."""
    tasks = {"tasks": [{"name": "chain_sum", "config": {"min_digits": 4, "max_digits": 4}}]}
    settings = ReasoningGymConfig.model_validate(tasks)
    first, second = (make_rows(settings, size=100, seed=seed) for seed in (0, 1))
    assert not {row["question"] for row in first} & {row["question"] for row in second}
    data = config(reasoning_gym=tasks | {"size": 3}, prompt_template="{metadata[expression]}=")
    assert all(prompt[0].isdigit() and prompt.endswith("=") for prompt in load(data).train["prompt"])


def test_a_family_with_too_few_questions_is_named() -> None:
    tasks = [{"name": "chain_sum", "config": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}]
    data = config(reasoning_gym={"tasks": tasks, "size": 50}, eval={"size": 3000})
    with pytest.raises(ValueError, match="tasks.0: chain_sum .* held out"):
        load(data)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "chain_sums"}, "tasks.0.name: .* no family 'chain_sums'; did you mean 'chain_sum'"),
        ({"name": "composite"}, "no family 'composite'"),
        ({"name": "chain_sum", "config": {"max_term": 2}}, "config.max_term: .* did you mean 'max_terms'"),
        ({"name": "chain_sum", "config": {"min_terms": 9, "max_terms": 2}}, "refuses these settings"),
        ({"name": "decimal_arithmetic", "config": {"max_num_decimal_places": 2}}, "refuses these settings"),
    ],
)
def test_mistakes_in_a_family_are_named(task: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_rows(ReasoningGymConfig.model_validate({"tasks": [task]}), size=2, seed=0)


def test_families_without_a_written_answer_cannot_be_sft_data() -> None:
    with pytest.raises(ValueError, match="all 3 training rows were dropped: {'empty completion': 3}"):
        load(config(reasoning_gym={"tasks": [{"name": "graph_color"}], "size": 3}), "sft")


def test_entries_survive_json_with_tuples_and_number_keys() -> None:
    value = {"board": ((1, 2), [3]), "by_id": {1: "a", (2, 3): None}, "plain": {"x": 1.5}}
    assert decode(encode(value)) == value


def test_scores_equal_the_librarys_own() -> None:
    """rearc compares tuples, decimal_arithmetic reads its settings, prime_factorization raises on words."""
    import reasoning_gym

    for name, settings in [("rearc", {}), ("decimal_arithmetic", {"max_num_decimal_places": 4}), ("chain_sum", {})]:
        tasks = [{"name": name, "config": settings}]
        row = make_rows(ReasoningGymConfig.model_validate({"tasks": tasks}), size=1, seed=0)[0]
        library = reasoning_gym.create_dataset(name, **settings)
        for answer in (row["answer"], "12", "", None):
            expected = library.score_answer(answer, decode(row["entry"]))
            assert score(answer, row["task"], row["task_config"], row["entry"]) == expected
        assert score(row["answer"], row["task"], row["task_config"], row["entry"]) == 1.0
    tasks = [{"name": "prime_factorization"}]
    row = make_rows(ReasoningGymConfig.model_validate({"tasks": tasks}), size=1, seed=0)[0]
    assert score("two times three", row["task"], row["task_config"], row["entry"]) == 0.0
