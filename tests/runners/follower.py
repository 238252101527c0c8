"""A process of a group that only listens: it starts sooner than one that loads models."""

from lmtp.runners.group import follow

if __name__ == "__main__":
    group = follow()
    while True:
        group.receive()
