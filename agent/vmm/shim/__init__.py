"""The library preloaded into QEMU that registers its guest's memory with userfaultfd, and its build."""
