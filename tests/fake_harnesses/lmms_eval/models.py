from language_models import tiny_model


class Qwen2VL:
    def __init__(self, pretrained, max_num_frames, device, device_map):
        self.model = tiny_model("qwen2-vl")

    def clean(self):
        del self.model


def get_model(kind):
    return {"qwen2_vl": Qwen2VL}[kind]
