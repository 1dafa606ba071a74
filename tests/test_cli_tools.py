"""The doctor: ports of Ray that others can reach, and tokens that are turned off."""

from __future__ import annotations

import socket

import pytest

from hedwig.cli import tools


def checks():
    return dict(tools._exposure())


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)


def listening_on(address, monkeypatch, family=socket.AF_INET):
    listener = socket.socket(family)
    listener.bind((address, 0))
    listener.listen()
    monkeypatch.setattr(tools, "_RAY_PORTS", {listener.getsockname()[1]: "dashboard"})
    return listener


def test_a_port_on_loopback_is_no_exposure_but_asks_for_tokens(monkeypatch):
    with listening_on("127.0.0.1", monkeypatch):
        assert checks()["ray ports"][0]
        assert not checks()["ray tokens"][0]
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        assert checks()["ray tokens"][0]


@pytest.mark.parametrize("listening", ["0.0.0.0", "10.1.2.3", "::", "::ffff:10.1.2.3", "fe80::1%eth0"])
def test_a_port_that_others_reach_is_named(monkeypatch, listening):
    monkeypatch.setattr(tools, "_listening", lambda: {8265: {listening}, 6379: {"127.0.0.1"}, 22: {"0.0.0.0"}})
    good, text = checks()["ray ports"]
    assert not good
    assert text.startswith(f"8265 (dashboard and job API) at {listening}: close them")


def test_the_kernels_table_is_read_right(monkeypatch):
    with listening_on("127.0.0.1", monkeypatch) as four:
        assert tools._listening()[four.getsockname()[1]] == {"127.0.0.1"}
    if socket.has_ipv6:
        try:
            six = listening_on("::1", monkeypatch, socket.AF_INET6)
        except OSError:
            return
        with six:
            assert tools._listening()[six.getsockname()[1]] == {"::1"}


def test_tokens_turned_off_are_reported_even_where_nothing_runs(monkeypatch):
    monkeypatch.setattr(tools, "_listening", dict)
    assert checks()["ray tokens"][0]
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    good, text = checks()["ray tokens"]
    assert (good, "RAY_AUTH_MODE=disabled" in text) == (False, True)
