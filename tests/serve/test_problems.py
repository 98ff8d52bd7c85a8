"""Problem details."""

import json

from normweave.serve.problems import CODES, answer


def test_an_answer_has_the_fields_of_rfc_9457_and_a_code():
    response = answer(404, "There is no inspection 9.")
    assert (response.status_code, response.media_type) == (404, "application/problem+json")
    assert json.loads(response.body) == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "There is no inspection 9.",
        "code": "not_found",
    }
    assert json.loads(answer(404, "é", code="narrower").body)["code"] == "narrower"


def test_what_may_succeed_later_has_retry_after():
    retried = {status for status in CODES if "retry-after" in answer(status, "").headers}
    assert retried == {429, 503}
    assert answer(405, "", headers={"Allow": "GET"}).headers["allow"] == "GET"
