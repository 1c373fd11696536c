import os

print("I am leaving")
os._exit(3)
