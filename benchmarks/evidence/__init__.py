"""What guards cost on healthy programs, and what they save on failing ones."""
