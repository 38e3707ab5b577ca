"""gptq-webui: download, load and chat with GPTQ models.

The package is the repository itself, known as `gptq_webui` in all its guises: a pip
package, a folder inside text-generation-webui, and `python script.py`. This file has no
import, so that each of them can load it before anything heavy is there.
"""

__version__ = "0.1.0"
