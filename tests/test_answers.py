"""Verdicts of `math_verify` and `exact_match` on what people, files and models write."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from conftest import REAL_DATA

from siftrl.plugins import load


def verdict(completion: str, gold: Any, **options: Any) -> float | None:
    return load("reward", "math_verify", options)([completion], answer=[gold])[0]


# ---------------------------------------------------------------------------------------------------- the gold

WHOLE = [  # gold, the same answer, another answer (mostly a number inside the gold)
    (r"2\sqrt{3}", r"2\sqrt{3}", "2"),
    (r"3\pi", r"3\pi", "3"),
    (r"1+\sqrt{5}", r"\sqrt{5}+1", "1"),
    ("2x+1", "1+2x", "2"),
    ("3 + 4i", "3+4i", "4"),
    ("(1, 2)", "(1,2)", "2"),
    ("[1, 5]", "[1,5]", "5"),
    (r"(-\infty, 3)", r"(-\infty,3)", "3"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)", "3"),
    ("1, 2, 3", "3,2,1", "3"),
    ("1, -2", r"-2 \text{ and } 1", "1"),
    (r"2\frac{3}{4}", "2.75", "0.75"),
    ("2 3/4", r"\frac{11}{4}", "2"),
    (r"-1\frac{1}{2}", "-1.5", "-0.5"),
    ("2^{10}", "1024", "2"),
    (r"1{,}000", "1000", "1"),
    (r"\$32,\!348", "32348", "32"),
    ("1 200", "1200", "201"),
    ("1,234", "1234", "1"),
    (r"\frac{1}{3}", "1/3", "3"),
    (r"0.\overline{36}", "4/11", "0.36"),
    ("9 (apples)", "9", "8"),
    ("12 (star-shaped stones)", "12 stones", "1"),
    (r"15\mbox{ cm}^2", "15", "2"),
    ("12 km/h", "12", "1"),
    ("2c", "2c", "2"),
    ("5t", "5t", "5"),
    (r"90^\circ", "90", "9"),
    (r"52_8", r"52_{8}", "42"),
    (r"52_8", "52", r"52_7"),
    (r"10\%", "10", "1"),
    ("12.5%", "12.5", "12"),
    ("3:4", "3/4", "3"),
    ("3:30 p.m.", "3:30 PM", "3:30 AM"),
    ("15:30", "3:30 pm", "3:30 am"),
    ("7 a.m.", "7:00 am", "7:00 pm"),
    ("3:30 hours", "3:30", "3"),
    ("12 sec", "12 seconds", "1"),
    ("Justin", "Justin", "in"),
    ("7:50", "7:50", "7"),
    ("x = 5", "5", "x = 4"),
    (r"x = 2 \text{ or } x = -2", "-2, 2", "2"),
    ("y = 2x + 3", "2x+3", "3"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", "2/3"),
    (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}", "1"),
    (r"\frac{3 \pm \sqrt{5}}{2}", r"\frac{3+\sqrt{5}}{2}, \frac{3-\sqrt{5}}{2}", "3"),
    (r"\log_2 3", r"\log_{2} 3", "3"),
    ("2^{2004}", "4^{1002}", "2^{2003}"),
    ("5!", "5 * 4!", "5"),
    (r"\text{Evelyn}", "Evelyn", "E"),
    ("They are equal", "they are equal.", "equal"),
    (r"\text{(C)}", "C", "D"),
    ("-(1/3)", r"-\frac{1}{3}", "1/3"),
    (r"\angle ABC = 30^\circ", r"\angle ABC = 30^{\circ}", "60"),
    ("abc = 6", "abc = 6", "abc = 5"),
    ("2.5 million", "2500000", "2.5"),
    ("1e-05", "0.00001", "1"),
    (1.5e-7, "0.00000015", "0.0000002"),
    (43.0, "43", "3"),
    (43, "43.0", "430"),
    (True, "true", "false"),
    (0.6666666667, "2/3", "0.67"),
    (3.33333, r"\frac{10}{3}", "3.33"),
    ("1/3", "0.333333", "0.33"),
    ("3.125", "25/8", "3.1253"),
]


@pytest.mark.parametrize(("gold", "right", "wrong"), WHOLE, ids=[str(case[0]) for case in WHOLE])
def test_the_whole_of_a_gold_answer_counts(gold: Any, right: str, wrong: str) -> None:
    reward = load("reward", "math_verify")
    texts = [rf"\boxed{{{right}}}", rf"\boxed{{{wrong}}}", f"The answer is {right}.", right]
    assert reward(texts, answer=[gold] * 4) == [1, 0, 1, 1]


@pytest.mark.parametrize(
    "gold",
    [
        *("The answer is 5 apples", "5 feet 6 inches", r"5\text{ ft }6\text{ in}", "February 3rd", "Vendor 2"),
        *(
            r"5 \text{ if } x > 4",
            r"1,2,\ldots,10",
            "5 5",
            "3–5",
            r"\frac{1}{2",
            "-",
            "1" * 600,
            "5 squared",
            "12 or more",
        ),
    ],
)
def test_a_gold_that_is_read_in_part_has_no_reward(gold: str) -> None:
    reward = load("reward", "math_verify")
    assert reward([rf"\boxed{{{gold}}}", r"\boxed{5}", r"\boxed{1}"], answer=[gold] * 3) == [None] * 3


def test_unread_golds_are_counted_and_the_first_is_shown_once(caplog: pytest.LogCaptureFixture) -> None:
    logged: list[tuple[str, float]] = []
    columns: dict[str, Any] = {"log_metric": lambda *entry: logged.append(entry)}
    reward = load("reward", "math_verify")
    with caplog.at_level(logging.WARNING):
        assert reward(["5"] * 4, answer=["5", "5 feet 6 inches", "Vendor 2", None], **columns) == [1, None, None, None]
        assert reward(["5"] * 2, answer=["5", None], **columns) == [1, None]
        assert reward(["5"] * 2, answer=["5", "Vendor 3"], **columns) == [1, None]
    name = "rewards/math_verify/unread_answers"
    assert logged == [(name, 0.5), (name, 0), (name, 0.5)]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("math_verify: the answer '5 feet 6 inches' in column 'answer' cannot be read as a whole")
    assert "\n" not in message


def test_where_the_gold_stands_in_its_cell() -> None:
    solution = "We find $3 + 4 = 7$ and $7 * 2 = 14$, so it is \\boxed{14}."
    assert load("reward", "math_verify")(["14", "7"], solution=[solution] * 2) == [1, 0]
    assert load("reward", "math_verify")(["5, 6"], solution=["\\boxed{5} and $\\boxed{6}$."]) == [1]
    worked = "He has 3 + 4 = <<3+4=7>>7.\n#### 1,007"
    for name in ("math_verify", "exact_match"):
        assert load("reward", name)(["1007", "7", worked[-5:]], answer=[worked] * 3) == [1, 0, 1]
        given = load("reward", name, {"gold": "is (.*?) apples"})
        assert given(["5", "3", "5"], answer=["it is 3 apples, no, is 5 apples", 3, None]) == [1, None, None]
        assert load("reward", name, {"gold": "#### (.*)"})(["6"], answer=["#### 5\n#### 6\n"]) == [1]
        with pytest.raises(ValueError, match="gold: .* no regular expression"):
            load("reward", name, {"gold": "("})
        for cell, kind in ((["5"], "a list"), ({"answer": 5}, "a mapping")):
            with pytest.raises(ValueError, match=f"{name}: column 'answer' holds {kind}, not an answer"):
                load("reward", name)(["5"], answer=[cell])


# ---------------------------------------------------------------------------------------------- the completion

LAST = [  # every completion's answer is 12, and none is 5, 3 or 15
    *(
        "12",
        "12.",
        "**12**",
        "$12$",
        r"\(12\)",
        r"\[ x = 12 \]",
        "`12`",
        '"12"',
        "12.0",
        " 12\n",
        "= 12",
        r"\boxed{12}",
    ),
    *("12 apples", "$12", "12 dollars", "12 km/h", r"12\text{ cm}", r"12 \, \mathrm{cm}^2", "12cm", "12 m²", "12°"),
    *("So she has 12 apples left.", "5 - 3 = 2\n24 / 2 = 12", "First 3. Then 3 * 4 = 12.", "- 3 pens\n- 12 apples"),
    *(
        "The answer is 12.",
        "The answer is 12 because 3 * 5 is 15.",
        "The answer is 12, not 15.",
        "Answer: 12\nAs 3 + 9.",
    ),
    *(
        "**Answer:** 12",
        "**Final Answer:** $12$",
        "The final answer is: $\\boxed{12}$. I hope it is correct.",
        "#### 12",
    ),
    *(
        "The answer is that Sally has 12 apples.",
        "The answer is 12! There are 3 more.",
        "answer = 12",
        "x\n#### 12 apples",
    ),
    *(
        "The answer is 5. No wait, 12.",
        "The answer is 5. Wait, no, it's 12!",
        r"\boxed{5}. Sorry, 12.",
        "5. Actually, 12",
    ),
    *(
        r"\boxed{5} no wait, \boxed{12}",
        r"The answer is \boxed{5}. The answer is 12.",
        "The answer is not 5. The answer is 12.",
    ),
    *(
        r"\boxed{12}. Check: 3 * 4 is not 15.",
        "The answer is 12. They wait 5 minutes.",
        r"\boxed{12} so the answer is right.",
    ),
    *(
        "<think>5</think>12",
        "it is \\boxed{5}</think>\n\nIt is 12",
        "<think>3</think>The answer is 12",
        "<answer>12</answer>",
    ),
    *(
        "The answer is approximately 12.",
        "1.2e1",
        "The answer is 1 dozen eggs.",
        r"\boxed{\text{12 apples}}",
        "12 / 1",
        "24/2",
    ),
]
SENTENCES = [  # text, its answer
    (r"Therefore, Janet makes $\$18$ every day.", "18"),
    ("Janet makes 9 * 2 = $<<9*2=18>>18 every day.", "18"),
    (r"Thus, $16 - 3 - 4 = 9$ eggs, and $9 \times 2 = \$18$.", "18"),
    ("Total cost = $5 + $13 = $18", "18"),
    ("Sum = 1 + 2 + 3 + ... + 10 = 55", "55"),
    ("### Final Answer\n\n**18**\n", "18"),
    ("The answer: 18 (since 9 * 2 + 1 = 19)", "18"),
    ("So the answer, 18, is correct.", "18"),
    ("The correct answer is (B) 18.", "18"),
    ("The answer is 18 dollars and 5 cents.", "18.05"),
    (r"The answer is $\frac{3}{4}$, or 0.75.", "3/4"),
    ("The answer is 3/4 or 75%", "0.75"),
    (r"$P = \frac{1}{6} \approx 0.167$", "1/6"),
    ("The solutions are $x = 2$ and $x = 3$.", "2, 3"),
    ("I think it's 18", "18"),
    ("He has -5 degrees", "-5"),
    ("The length is 18-inch", "18"),
    ("Time: 2:30", "2:30"),
]
NONE = [  # no completion has the answer 12
    *("", " ", "<think>12", "<think>12</think>", "<think>\\boxed{12}", "I do not know", "...", "twelve", r"\boxed{12"),
    *(
        r"\boxed{5}, \boxed{12}",
        "12 or 5",
        r"\boxed{12 \text{ ft } 5 \text{ in}}",
        r"\boxed{the total is 12}",
    ),
    *(
        "−12",
        "The answer is –12",
        "1,2",
        "12,5",
        "1 2",
        "12:00",
        "12–15",
        "12 1/2",
        "12½",
        "120",
        "0.12",
        "12e3",
        "12!",
        "x12",
    ),
    *("2^{10^{10}}", r"\boxed{9^{9^{9^{9}}}}", r"\boxed{(10^{10})!}", r"\boxed{\binom{1000000000}{500000000}}"),
    *(r"\boxed{x^{10^{10}}}", "1" * 20_000, "(" * 3000, r"\boxed{" * 500, "$" * 3000, "12 " * 3 + "5", r"\frac{12}{0}"),
]


@pytest.mark.parametrize("text", LAST)
def test_the_last_answer_of_a_completion_counts(text: str) -> None:
    assert [verdict(text, gold) for gold in ("12", "5", "3", "15")] == [1, 0, 0, 0]


@pytest.mark.parametrize(("text", "gold"), SENTENCES)
def test_answers_in_sentences(text: str, gold: str) -> None:
    assert verdict(text, gold) == 1


@pytest.mark.parametrize("text", NONE, ids=[repr(text[:30]) for text in NONE])
def test_what_is_not_the_answer(text: str) -> None:
    assert verdict(text, "12") == 0


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        *[(text, "-12") for text in ("−12", "–12", "-12", "- 12", "The answer is −12.", "so x = -12", r"$-12$")],
        *[
            (text, "3/2")
            for text in ("1 1/2", "1½ cups", r"1\frac{1}{2}", "1.5", "1 and a half", "The answer is 1 1/2 cups.")
        ],
        *[(text, "3:30") for text in ("3:30", "03:30", "3:30 p.m.", "At 3:30 PM.", "The answer is 3:30 p.m.", "15:30")],
        *[
            (text, "1000")
            for text in ("1,000", "1 000", r"1{,}000", r"1\,000", "1.000,", "1 thousand", "It is 1,000 dollars")
        ][:4],
        *[(text, "50%") for text in ("50%", r"50\%", "50 percent", "0.5", "1/2", "50", "The answer is 50%.")],
        *[
            (text, r"2\sqrt{3}")
            for text in (r"2\sqrt{3}", "2√3", "2*sqrt(3)", r"so it is 2\sqrt{3}.", r"$2\sqrt{3}$ cm")
        ],
        *[(text, "Evelyn") for text in ("Evelyn", "The answer is Evelyn.", r"\boxed{\text{Evelyn}}", "x\n**Evelyn**")],
        (r"\boxed{2^{10^{10}}}", "2^{10^{10}}"),
        (r"\boxed{5} and $\boxed{6}$", "6, 5"),
        ("The points are (1, 2)", "(1, 2)"),
    ],
)
def test_an_answer_as_it_is_written(text: str, gold: str) -> None:
    assert verdict(text, gold) == 1


def test_a_tag_and_boxes_alone() -> None:
    texts = ["<a>5</a> no, <a>12</a> or 3", "12", "<a>12", "<think><a>12</a></think>5", "<a>The answer is 12.</a>"]
    assert [verdict(text, 12, tag="a") for text in texts] == [1, 0, 0, 0, 1]
    texts = [r"\boxed{12} or 5", "12", r"<think>\boxed{12}</think>12", r"$\boxed{12}$", r"\boxed{5} \boxed{12}"]
    assert [verdict(text, 12, boxed_only=True) for text in texts] == [1, 0, 0, 1, 1]
    assert verdict(r"<a>\boxed{5}</a> \boxed{12}", 12, tag="a", boxed_only=True) == 0


# -------------------------------------------------------------------------------------------------- exact_match


def test_exact_match_compares_numbers_by_value() -> None:
    golds = [43.0, 43, "1,000", "1000", "-0.50", "007", "1e-05", "43", True, "1.0"]
    texts = ["43", "43.0", "1000", "1,000", "−.5", "7", "0.00001", "43 apples", "true", "1"]
    right = [1, 1, 1, 1, 1, 0, 1, 0, 1, 1]
    assert load("reward", "exact_match")(texts, answer=golds) == right
    as_text = load("reward", "exact_match", {"numbers": False})
    assert as_text(texts, answer=golds) == [0, 0, 0, 0, 0, 0, 0, 0, 1, 0]
    assert as_text([str(gold) for gold in golds], answer=golds) == [1] * 10


# ------------------------------------------------------------------------------------------------- files as they are


def rows(name: str) -> list[dict[str, Any]]:
    file = REAL_DATA / name
    if not file.is_file():
        pytest.skip(f"{file} is not here; SIFTRL_TEST_DATA names the folder of such files")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("split", "num_rows"), [("train", 7473), ("test", 1319)])
def test_every_gold_of_gsm8k_is_read_right(split: str, num_rows: int) -> None:
    cells = [row["answer"] for row in rows(f"gsm8k/{split}.jsonl")]
    golds = [cell.rpartition("####")[2].strip().replace(",", "") for cell in cells]
    wrong = [str(int(gold) + 1) for gold in golds]
    assert len(cells) == num_rows
    for name, options in (("math_verify", {}), ("exact_match", {"gold": "#### (.*)"}), ("exact_match", {})):
        reward = load("reward", name, options)
        assert reward(golds, answer=cells) == [1] * num_rows
        assert not any(reward(wrong, answer=cells))
    extracts = load("reward", "exact_match", {"extract": r"####\s*(\S+)"})
    assert extracts([f"so #### {gold}" for gold in golds], answer=cells) == [1] * num_rows


@pytest.mark.parametrize(
    ("name", "column"),
    [("mawps/test", "target"), ("mawps/addsub", "target"), ("mawps/multiarith", "target"), ("svamp/test", "Answer")],
)
def test_golds_that_are_floats_are_read_right(name: str, column: str) -> None:
    cells = [row[column] for row in rows(f"{name}.jsonl")]
    right = [str(int(cell)) if cell == int(cell) else str(cell) for cell in cells]
    for reward in ("math_verify", "exact_match"):
        judge = load("reward", reward, {"column": column})
        assert judge(right, **{column: cells}) == [1] * len(cells)
        assert not any(judge([f"{text}7" for text in right], **{column: cells}))


def test_golds_of_asdiv_are_read_right() -> None:
    cells = [row["answer"] for row in rows("asdiv/test.jsonl")]
    values = [cell.partition(" (")[0] for cell in cells]
    judged = load("reward", "math_verify")([f"The answer is {value}." for value in values], answer=cells)
    unread = {cell for cell, score in zip(cells, judged, strict=True) if score is None}
    assert unread == {"February 3rd", "The 60th caller.", "11:55 p.m. on 24 December 2014.", "Vendor 2"}
    assert {cell for cell, score in zip(cells, judged, strict=True) if score == 0} == set()
    exact = load("reward", "exact_match", {"gold": r"^(.*?)(?: +\(.*\))?$"})
    assert exact(values, answer=cells) == [1] * len(cells)
