class HFLM:
    def __init__(self, pretrained, batch_size, tokenizer, max_length=None):
        assert tokenizer is not None
        self.model = pretrained

    def _model_generate(self, context):
        return self.model.generate(context, max_new_tokens=1, do_sample=False)[0, -1]
