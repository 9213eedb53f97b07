"""placeholder"""


def render(content):
    return "<!doctype html><title>tersor</title>"
