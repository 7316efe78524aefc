METADATA = []


NO_ROOM = []
"""Names and lengths of tasks whose prompts have no answer."""


class Task(str):
    """A name, whose prompts have an answer."""

    def test_docs(self):
        (length,) = METADATA[-1]["max_seq_lengths"]
        return [{"outputs": ["an answer"] * ((str(self), length) not in NO_ROOM)}]


class TaskManager:
    def __init__(self, include_path, metadata):
        METADATA.append(metadata)
        self.all_subtasks = ["niah_multikey_2", "ruler_vt", "longbench_qasper", "longbench_lsht"]

    def load(self, names):
        if names == ["longbench_lsht"]:
            raise ModuleNotFoundError("No module named 'jieba'", name="jieba")
        if names[0].startswith("longbench"):
            raise ConnectionError("Couldn't reach 'Xnhyacinth/LongBench' on the Hub")
        return {"tasks": {name: Task(name) for name in names}}
