class TaskManager:
    pass


def get_task_dict(names, manager):
    return dict.fromkeys(names)
