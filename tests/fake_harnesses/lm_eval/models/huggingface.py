class HFLM:
    def __init__(self, pretrained, batch_size, tokenizer, max_length=None):
        assert tokenizer is not None
        self.model = pretrained
