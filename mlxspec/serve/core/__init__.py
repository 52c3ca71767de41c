"""What every route stands on: the thread of the device, its texts, and what is seen of them."""
