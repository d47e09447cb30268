"""What is said of a group whose connections broke."""

from disttrain_trainer.parallel.backend import BrokenGroup


def test_it_is_what_happened_and_not_where_in_gloos_source() -> None:
    error = RuntimeError(
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:38134\nException raised from"
    )
    assert str(BrokenGroup(error)) == "Connection closed by peer [127.0.0.1]:38134"
    assert str(BrokenGroup("not all of 3 ranks came within 60 s")) == "not all of 3 ranks came within 60 s"
