import jax
import pytest

from zipir_jax.command_line import machine


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            ValueError("height 333 is not\n a multiple of 32"),
            2,
            "error: height 333 is not a multiple of 32\n",
        ),
        (FileNotFoundError(2, "No such file", "a.png"), 2, "error: [Errno 2] No such file: 'a.png'\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_an_error_is_one_line_and_a_status(call, error, status, message):
    def main(arguments):
        raise error

    assert call(main, "--a", 1) == (status, "", message)
    if status == 2:
        with pytest.raises(type(error)):
            call(main, "--debug")


def test_other_errors_are_ours_to_explain(call):
    with pytest.raises(ZeroDivisionError):
        call(lambda arguments: 1 / 0)


def test_what_main_returns_is_the_status(call):
    seen = []
    for result, status in [(None, 0), (0, 0), (1, 1)]:
        assert (
            call(lambda arguments, result=result: seen.append(arguments) or result, "--debug", "x")[0]
            == status
        )
    assert seen == [["x"]] * 3


def test_the_machine_is_named_with_its_versions():
    assert f"jax {jax.__version__}" in machine()
    assert machine().count("\n") == 0 and not machine().startswith(",")
