"""The extension's tab in the page of the stand-in host (tests/host), and what visitors see of it."""

import socket
import urllib.request

import kinds_of_walks
import pytest
from host_process import Host, host, one, place, put

__all__ = ["host", "one", "place"]  # fixtures


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def require_gradio_4() -> None:
    import gradio

    if int(gradio.__version__.split(".")[0]) != 4:
        pytest.skip("the host's page is drawn by Gradio 4")


@pytest.mark.browser
def test_visitors_of_a_host_for_several_users_choose_no_model(place):
    require_gradio_4()
    put(place, "extensions")
    port = free_port()
    host = Host(place, "--extensions", "gptq_webui", "--multi-user", "--listen-port", str(port))
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/config").read().decode()
    assert "visitors cannot choose a model" in page and '"elem_id":"gw-models"' not in page
    host.close()


@pytest.mark.browser
def test_our_tab_in_the_hosts_page(place):
    require_gradio_4()
    from browser import chromium

    put(place, "extensions")
    port = free_port()
    host = Host(place, "--extensions", "gptq_webui", "--listen-port", str(port))
    assert host.ready == {"ready": True}, host.said()
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(20_000)
        page.goto(f"http://127.0.0.1:{port}")
        page.get_by_role("tab", name="GPTQ").click()
        page.click("#gw-models input")
        page.get_by_role("option", name="tiny-2023").click()
        page.wait_for_selector("#gw-model-status:has-text('Ready')")
        assert "32 weights share a scale" in page.inner_text("#gw-facts")
        assert host("state")["name"] == "tiny-2023"
        assert page.inner_text("#gw-idle-box button >> nth=0").startswith("Report")  # the idle unload is the host's own
        page.get_by_role("tab", name="Model", exact=True).click()
        page.wait_for_selector("#host-status:has-text('Successfully loaded')")
        assert page.input_value("#host-menu input") == "tiny-2023"
        assert "Successfully" in host("load", name="tiny-random-in-the-host")["said"][-1]  # by the host meanwhile
        page.get_by_role("tab", name="GPTQ").click()
        page.wait_for_function("document.querySelector('#gw-models input').value.startsWith('tiny-random-in-the-host')")
        page.click("text=When the web UI starts")
        page.click("#gw-autoload input")
        page.get_by_role("option", name="tiny-config").click()
        page.wait_for_selector("text=tiny-config is loaded when the web UI starts")
        page.click("#gw-unload")
        page.wait_for_selector("#gw-model-status:has-text('Unloaded')")
        assert host("state")["model"] == "NoneType"
    host.close()
    again = Host(place, "--extensions", "gptq_webui")
    assert again("state")["name"] == "tiny-config"
    again.close()


@pytest.mark.browser
def test_models_of_other_kinds_are_chosen_in_our_tab_and_answer_in_the_host(place):
    """Gemma 3, a mixture of experts, a hybrid, and one that sees pictures: one after the other in the same host."""
    require_gradio_4()
    from browser import WAIT_MS, chromium

    kinds_of_walks.write(place / "user_data" / "models")
    put(place, "extensions")
    port = free_port()
    host = Host(place, "--extensions", "gptq_webui", "--listen-port", str(port))
    assert host.ready == {"ready": True}, host.said()
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(WAIT_MS)
        page.goto(f"http://127.0.0.1:{port}")
        for name in kinds_of_walks.NAMES:
            page.get_by_role("tab", name="GPTQ").click()
            page.click("#gw-models input")
            page.get_by_role("option", name=name).click()
            page.wait_for_selector(f"#gw-model-status:has-text('Ready') >> text={name}")
            assert host("state")["name"] == name
            page.get_by_role("tab", name="Model", exact=True).click()
            page.wait_for_selector(f"#host-status:has-text('{name}')")
            assert page.input_value("#host-menu input") == name
            answer = host("ask", text="Who are you?", tokens=8, past_end=True)
            assert answer.get("texts", 0) > 5 and answer["answer"], (name, answer, host.said())
            assert host("ask", text="Who are you?", tokens=8, past_end=True) == answer  # greedy: the same again
    host.close()
