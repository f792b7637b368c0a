import base64
import os
import signal
import threading

import numpy as np

from readapt_ray.serving import schema, server


def test_base64_is_little_endian_float32():
    vector = np.array([1.5, -2.0, 3e-5], np.float32)
    assert np.frombuffer(base64.b64decode(schema.to_base64(vector)), "<f4").tolist() == vector.tolist()
    assert schema.to_base64(vector.astype(">f4")) == schema.to_base64(vector)


def test_the_kind_of_an_error_follows_its_status():
    assert schema.error_body("m", status=429)["error"]["type"] == "rate_limit_error"
    assert schema.error_body("m", status=404)["error"]["type"] == "invalid_request_error"
    assert schema.error_body("m", status=503)["error"]["type"] == "server_error"
    error = schema.RequestError("no such model", status=404, param="model", code="model_not_found")
    assert error.body == {
        "error": {
            "message": "no such model",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }


def test_a_signal_ends_the_wait_and_leaves_the_handlers_as_they_were():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for each in (signal.SIGINT, signal.SIGTERM):
        timer = threading.Timer(0.2, os.kill, (os.getpid(), each))
        timer.start()
        server._wait_for_signal()
        timer.join()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
