"""The casebook: failing programs with cured twins, and healthy programs, that the diagnosis is tested on."""
