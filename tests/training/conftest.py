import pytest

from ada2i_fast import Ada2IConfig
from ada2i_fast.data import synthetic_corpus


@pytest.fixture(scope="session")
def corpus():
    return synthetic_corpus(3, 20, min_length=2, max_length=4, widths={"t": 10, "a": 8, "v": 9})


@pytest.fixture
def small(corpus):
    """Builds a configuration that trains in no time: small(preset, **options)."""

    def build(preset="published", **options):
        tiny = dict(hidden_dim=6, tensor_rank=2, feedforward_dim=8, encoder_layers=1, afw_layers=1, batch_size=4, epochs=3,
                    learning_rate=3e-3, alpha=0.1, dev_split="official")
        return Ada2IConfig.preset(preset, "synthetic", **{**tiny, **options}, input_widths=corpus.widths,
                                  num_classes=corpus.num_classes)

    return build
