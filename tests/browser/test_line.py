"""The page Line in a real browser."""

import pytest
from playwright.sync_api import expect

pytestmark = pytest.mark.browser


@pytest.mark.usefixtures("sent")
def test_an_engineer_sends_a_refused_message_again(visit):
    """The receiver of the server has refused the first message."""
    page = visit("/line", role="engineer")
    output = page.locator(".output")
    expect(output).to_contain_text("mes webhook")
    expect(output).to_contain_text("status 410")
    expect(output.locator(".light.amber")).to_be_visible()
    page.get_by_role("button", name="Send again to mes").click()
    expect(output.locator(".light.green")).to_be_visible()
    expect(output).to_contain_text("working")
    expect(output).not_to_contain_text("status 410")
