METADATA = []


class TaskManager:
    def __init__(self, include_path, metadata):
        METADATA.append(metadata)
        self.all_subtasks = ["niah_multikey_2", "ruler_vt", "longbench_qasper"]

    def load(self, names):
        if names[0].startswith("longbench"):
            raise ConnectionError("Couldn't reach 'Xnhyacinth/LongBench' on the Hub")
        return {"tasks": {name: name for name in names}}
