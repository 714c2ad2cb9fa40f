"""Wrong prompts and answers, one case a kind of fault; as in wrong_data.py."""

from typing import Any

from tests.unit.wrong_data import Build, rows, without_files

_ASKED = [{"prompt": f"ask {i}", "completion": f"tell {i}", "topic": "xy"[i % 2]} for i in range(8)]
_IID = "data.partition.kind=iid"


def answers(line: Any, *more: str, head: str = "completion") -> Build:
    """A training row after two good ones, of prompts and answers."""
    good = _ASKED[:2]
    if head == "dpo":
        good = [{"prompt": "ask", "chosen": f"yes {i}", "rejected": "no"} for i in range(2)]
    return rows([*good, line], good[:1], [f"model.head={head}", *(more or [_IID])])


def turns(*pairs: tuple[str, str]) -> dict[str, Any]:
    """A row of messages."""
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


CASES: list[tuple[str, Build, str]] = [
    (
        "prompts that have no answers",
        answers({"prompt": "ask"}),
        r"line 3: neither 'messages' nor 'prompt' and 'completion' \(there are: 'prompt'\); data",
    ),
    (
        "a blank answer",
        answers({"prompt": "ask", "completion": " "}),
        r"line 3: 'completion' must be a non-empty text, not ' '",
    ),
    (
        "messages that are a text",
        answers({"messages": "ask"}),
        r"line 3: 'messages' must be a list of messages, not 'ask'",
    ),
    (
        "a message that is no object",
        answers({"messages": ["ask", "tell"]}),
        r"line 3: each message in 'messages' must have a role and a content .*, not 'ask'",
    ),
    (
        "a message of a tool",
        answers(turns(("user", "ask"), ("tool", "7"), ("assistant", "tell"))),
        r"line 3: a message in 'messages' is of the role 'tool'; there are system, user and",
    ),
    (
        "a conversation that ends with a question",
        answers(turns(("user", "ask"), ("assistant", "tell"), ("user", "more"))),
        r"line 3: 'messages' must begin with .* end with an answer of the assistant, and its roles",
    ),
    (
        "a conversation that begins with an answer",
        answers({"conversations": [{"from": "gpt", "value": "tell"}]}),
        r"line 3: 'conversations' must begin with a message of the user, or of the system",
    ),
    (
        "an answer that is none of its choices",
        answers({"prompt": "ask", "completion": "c", "choices": ["a", "b"]}),
        r"line 3: 'completion' must be one of 'choices', which differ, or the number of one",
    ),
    (
        "one choice",
        answers({"prompt": "ask", "completion": "a", "choices": ["a"]}),
        r"line 3: 'choices' must be a list of at least two texts",
    ),
    (
        "a context of an instruction that is no text",
        answers({"instruction": "ask", "input": 3, "output": "tell"}),
        r"line 3: 'input' must be a text, not 3",
    ),
    (
        "prompts partitioned by labels",
        answers(_ASKED[2], "data.partition.kind=dirichlet"),
        r"data\.partition\.kind=dirichlet goes by the rows' kinds, and prompts have no labels",
    ),
    (
        "prompts without the column that they are partitioned by",
        answers({"prompt": "ask", "completion": "tell"}, "data.partition.column=topic"),
        r"line 3: no 'topic' \(there are: 'prompt', 'completion'\), which data\.partition\.column",
    ),
    (
        "a test row of a kind that no training row has",
        rows(_ASKED[:4], [_ASKED[0] | {"topic": "z"}],
             ["model.head=completion", "data.partition.column=topic"]),
        r"test kind 'z' never occurs in the training rows \(there: x, y\)",
    ),
    (
        "a preference without a worse answer",
        answers({"prompt": "ask", "chosen": "a"}, head="dpo"),
        r"line 3: no 'rejected' \(there are: 'prompt', 'chosen'\); data\.columns says",
    ),
    (
        "a preference for nothing",
        answers({"prompt": "ask", "chosen": "a", "rejected": "a"}, head="dpo"),
        r"line 3: 'chosen' and 'rejected' are the same",
    ),
    (
        "a preference of whole conversations",
        answers({"prompt": "ask", "chosen": [], "rejected": "a"}, head="dpo"),
        r"line 3: 'chosen' must be a list of messages, not \[\]",
    ),
    (
        "prompts in the built-in data",
        without_files("model.head=completion", _IID),
        r"model\.head=completion needs rows of prompts and answers, which task 'questions' has not",
    ),
    (
        "labels in the built-in instructions",
        without_files("task.name=skills", _IID),
        r"task 'skills' has prompts with their answers, which model\.head=classifier does not take",
    ),
]  # fmt: skip
