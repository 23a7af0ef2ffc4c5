"""The files a virtual machine boots from: kernel, initramfs and base root file system; how they are made and kept."""
