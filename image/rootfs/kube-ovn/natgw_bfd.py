"""Start a program of gateway.bfd, or of another PACKAGE: `python3 -I -S natgw_bfd.py [PACKAGE.]MODULE [ARGUMENT ...]`.

With -S nothing but the standard library is on the path and a third of the memory is saved; this adds the one
directory that holds our own code: the checkout that this file lies in, or the site-packages of the interpreter
that runs it.
"""

import os
import sys


def library():
    here = os.path.dirname(os.path.realpath(__file__))
    checkout = os.path.normpath(here + "/../../..")
    if os.path.exists(checkout + "/gateway/bfd/__init__.py"):
        return checkout
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return os.path.normpath(os.path.join(os.path.dirname(sys.executable), "..", "lib", version, "site-packages"))


sys.path.append(library())
name = sys.argv[1] if "." in sys.argv[1] else "bfd." + sys.argv[1]
module = __import__("gateway." + name, fromlist=["main"])
sys.exit(module.main(sys.argv[2:]))
