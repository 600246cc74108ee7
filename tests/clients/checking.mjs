// What the scripts for node that try a client share.
import { readFileSync, writeFileSync } from 'node:fs';

// Where the server is, what it is asked, and what it has to answer; see expectations.py.
export const CASE = JSON.parse(readFileSync(process.env.CLIENT_CASE, 'utf8'));

// Run the checks, functions that assert something of the client's answers, and write what became of each.
export async function runChecks(checks) {
  const outcomes = {};
  for (const check of checks) {
    try {
      await check();
      outcomes[check.name] = null;
    } catch (error) {
      console.error(error);
      outcomes[check.name] = String(error);
    }
  }
  writeFileSync(process.env.CLIENT_OUTCOMES, JSON.stringify(outcomes));
}
