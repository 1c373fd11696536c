"""The exams. Each module has one public function, `examine(context)`, and runs in a child process of its own."""
