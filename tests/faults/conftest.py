from tests.faults.failing_s3 import failing_s3  # noqa: F401  a fixture of all tests here
