import pytest

from tests.cuda import both


@pytest.fixture(autouse=True)
def on_the_gpu_too():
    with both.every_row():
        yield
