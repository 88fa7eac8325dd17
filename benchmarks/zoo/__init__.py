"""Small networks that train or fail to train as they are initialized, and what the check makes of them."""
