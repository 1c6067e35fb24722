"""A laboratory of guests: real Linux machines in QEMU, without KVM and without an installed system.

`image` makes a kernel and a small system in memory from Debian packages, once, in the folder of the build products.
`machine` starts guests from them: disks by vhost-user-blk, raw file or NBD, a network that reaches the loopback of the
host at 10.0.2.2, a shell that a test speaks to, and a power switch.
"""

from .image import Image
from .machine import Guest, Lost

__all__ = ["Guest", "Image", "Lost"]
