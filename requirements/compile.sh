#!/bin/sh
# Re-lock the requirements, hashes and all. Needs uv. Packages younger than a week are left out: a stolen release is
# usually found within days (BerriAI/litellm#24512 took 46 minutes). No index address may enter the files.
set -eu
cd "$(dirname "$0")/.."
newest=$(date -u -d '7 days ago' +%Y-%m-%d)
lock() {
    out=$1; shift
    uv pip compile pyproject.toml "$@" --universal --python-version 3.11 --generate-hashes --no-header --quiet \
        --no-emit-index-url --no-emit-find-links --exclude-newer "$newest" --output-file "requirements/$out"
}
lock dev.txt --extra embedded --group dev
lock embedded.txt --extra embedded --constraint requirements/dev.txt
lock runtime.txt --constraint requirements/dev.txt
