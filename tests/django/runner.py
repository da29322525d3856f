"""Run the tests of the Django project with Django's test runner, on a test database of its own."""

import sys

from tests.django import project

if __name__ == "__main__":
    from django.test.runner import DiscoverRunner

    assert project
    runner = DiscoverRunner(verbosity=0, interactive=False)
    suite = runner.build_suite(["tests.django.project_tests"])
    failures = runner.run_tests(["tests.django.project_tests"])
    print(f"{suite.countTestCases() - failures} tests passed")
    sys.exit(failures)
