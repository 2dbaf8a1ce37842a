"""A model in a real browser: wllama from the npm registry, the bundle's page, and Chromium to
measure the file where it will run."""

from edgedistill.browser.chromium import BROWSER_VARIABLE, find_browser
from edgedistill.browser.model import WllamaModel
from edgedistill.browser.page import LARGEST_MODEL_BYTES, WEB, page_files, student_config
from edgedistill.browser.wllama import WLLAMA, package_file, package_files

__all__ = [
    "BROWSER_VARIABLE",
    "LARGEST_MODEL_BYTES",
    "WEB",
    "WLLAMA",
    "WllamaModel",
    "find_browser",
    "package_file",
    "package_files",
    "page_files",
    "student_config",
]
